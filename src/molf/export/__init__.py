"""``molf export``: a run as files that others take, each of them verified before anyone sees it.

``run`` reads a run directory, ``weights`` and ``delta`` write the four forms, ``verify`` compares logits, ``card``
writes the model card, ``folder`` puts the result in place, and ``make`` is the order of it all.
"""
