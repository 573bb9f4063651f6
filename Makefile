# make demo: fine-tune the bundled model by every method.  make test: lint, types and all tests but the slow ones.
PYTHON ?= python3
PIP = .venv/bin/pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test clean

demo: .venv/train.stamp
	.venv/bin/molf demo

test: .venv/dev.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/pytest -n 2 --dist loadfile

.venv/bin/pip:
	$(PYTHON) -m venv .venv

# torch first and by its pinned version: an unpinned one may pull gigabytes
.venv/train.stamp: .venv/bin/pip pyproject.toml constraints.txt
	$(PIP) torch==2.13.0
	$(PIP) -e '.[train]'
	touch $@

.venv/dev.stamp: .venv/bin/pip pyproject.toml constraints.txt
	$(PIP) torch==2.13.0
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
