// The passes of passes.py on a CPU, each as one loop over memory; adamw.py has their mathematics.
//
// A job is one matrix of a trained tensor, its moments and its gradient, rows behind each other. All jobs of a call are
// dealt to the threads in pieces of a row, so that neither many small tensors nor a few large ones leave a thread idle.
// Sums are added up by piece and row: they do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t PIECE = 4096;   // elements of a row at most that are worked on at once
constexpr int64_t SHARE = 65536;  // elements that a thread takes, about: pieces differ in size
constexpr int64_t BLOCK = 64;     // elements of a vectorised loop
constexpr int64_t LINE = 16;      // floats of a cache line
constexpr int64_t AHEAD = 256;    // elements from the one in work to the one that is fetched into the L2
constexpr int64_t HEIGHT = 2;     // rows and columns of P whose sums stay in registers
constexpr int64_t WIDTH = 32;

struct Job {
  const void* grad;       // fp32 or bf16; null if the moments stay
  float* m;               // the first moment; null if the gradient alone is looked at
  float* v;               // the second
  float* value;           // null if it stays
  uint16_t* store;        // bf16, takes the value rounded; or null
  const uint8_t* winner;  // per row whether the value moves; null: all do
  float* sums;            // what the score sums over each row, or the gradient's squares; or null
  int64_t rows, columns;
  int64_t bf16;         // whether the gradient is
  double decay;         // 1 - ηλ
  double size;          // -η / (1-β1ⁿ)
  const float* decays;  // one per row, or null: the one above
  const float* sizes;   // likewise
};

struct Numbers {
  float lerp;          // 1-β1
  float beta2;         // β2
  float square;        // 1-β2
  float eps;           // ε
  float inverse_root;  // 1 / √(1-β2ⁿ)
  float clip;          // the clipping factor
};

enum Kind { SQUARES, EPD, PFN, UPDATE, UNROUTED };

inline float load(const float* grad, int64_t i) { return grad[i]; }

inline float load(const uint16_t* grad, int64_t i) {
  const uint32_t bits = static_cast<uint32_t>(grad[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t rounded(float value) {  // to bf16, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// One element; returns its term of what is summed.
template <Kind kind, class Grad>
inline float element(const Grad* grad, float* m, float* v, float* value, int64_t i, float decay, float size, Numbers c) {
  if (kind == SQUARES) {
    const float g = load(grad, i);
    return g * g;
  }
  float first = m[i], second = v[i];
  if (kind != UPDATE) {
    const float g = load(grad, i) * c.clip;
    first = c.lerp < 0.5f ? first + c.lerp * (g - first) : g - (g - first) * (1 - c.lerp);
    second = second * c.beta2 + c.square * g * g;
    m[i] = first;
    v[i] = second;
  }
  const float root = std::sqrt(second);
  if (kind == EPD) return first * first / (root + c.eps);
  if (kind == PFN) {
    const float ratio = first / (root + c.eps);
    return ratio * ratio;
  }
  value[i] = value[i] * decay + first * size / (root * c.inverse_root + c.eps);
  return 0;
}

// So many elements from ``start`` on; returns the sum of their terms.
template <Kind kind, class Grad>
double piece(const Job& job, int64_t start, int64_t count, float decay, float size, Numbers c) {
  const Grad* __restrict grad = static_cast<const Grad*>(job.grad) + start;
  float* __restrict m = job.m + start;
  float* __restrict v = job.v + start;
  float* __restrict value = job.value + start;
  double total = 0;
  int64_t k = 0;
  for (; k + BLOCK <= count; k += BLOCK) {
    for (int64_t line = k + AHEAD; line < k + AHEAD + BLOCK; line += LINE) {
      if (kind != UPDATE) __builtin_prefetch(grad + line, 0, 2);
      if (kind != SQUARES) __builtin_prefetch(m + line, 0, 2);
      if (kind != SQUARES) __builtin_prefetch(v + line, 0, 2);
      if (kind >= UPDATE) __builtin_prefetch(value + line, 0, 2);
    }
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = k; i < k + BLOCK; ++i) sum += element<kind>(grad, m, v, value, i, decay, size, c);
    total += sum;
  }
  for (; k < count; ++k) total += element<kind>(grad, m, v, value, k, decay, size, c);
  if (kind >= UPDATE && job.store)
    for (int64_t i = 0; i < count; ++i) job.store[start + i] = rounded(value[i]);
  return total;
}

int64_t pieces(const Job& job) { return (job.columns + PIECE - 1) / PIECE; }

// Jobs from the numbers of all of them, field after field.
template <class T>
std::vector<T> read(const int64_t* table, int64_t count) {
  constexpr int64_t fields = sizeof(T) / sizeof(int64_t);
  std::vector<T> jobs(count);
  for (int64_t i = 0; i < count; ++i) {
    int64_t job[fields];
    for (int64_t field = 0; field < fields; ++field) job[field] = table[field * count + i];
    std::memcpy(&jobs[i], job, sizeof job);
  }
  return jobs;
}

template <Kind kind>
void run(const std::vector<Job>& jobs, Numbers c, int64_t threads) {
  const int64_t count = jobs.size();
  std::vector<int64_t> first(count + 1, 0);  // the first piece of each job
  for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + jobs[i].rows * pieces(jobs[i]);
  int64_t elements = 0;
  for (const Job& job : jobs) elements += job.rows * job.columns;
  const int64_t chunk = 1 + SHARE * first[count] / (elements + 1);
  std::vector<double> terms(kind < UPDATE ? first[count] : 0);
#pragma omp parallel num_threads(threads)
  {
    int64_t i = 0;
#pragma omp for schedule(monotonic : dynamic, chunk)
    for (int64_t p = 0; p < first[count]; ++p) {
      while (p >= first[i + 1]) ++i;
      const Job& job = jobs[i];
      const int64_t row = (p - first[i]) / pieces(job), column = (p - first[i]) % pieces(job) * PIECE;
      if (job.winner && !job.winner[row]) continue;
      const int64_t start = row * job.columns + column, elements = std::min(PIECE, job.columns - column);
      const float decay = job.decays ? job.decays[row] : job.decay, size = job.sizes ? job.sizes[row] : job.size;
      const double found = job.bf16 ? piece<kind, uint16_t>(job, start, elements, decay, size, c)
                                    : piece<kind, float>(job, start, elements, decay, size, c);
      if (kind < UPDATE) terms[p] = found;
    }
  }
  for (int64_t i = 0; kind < UPDATE && i < count; ++i)
    for (int64_t row = 0; row < jobs[i].rows; ++row) {
      const double* of_row = terms.data() + first[i] + row * pieces(jobs[i]);
      double sum = 0;
      for (int64_t p = 0; p < pieces(jobs[i]); ++p) sum += of_row[p];
      jobs[i].sums[row] = static_cast<float>(sum);
    }
}

struct Product {
  void* target;        // P (rows, columns), fp32 or bf16
  const float* base;   // W
  const float* left;   // (rank, rows)
  const float* right;  // (rank, columns)
  int64_t rows, columns;
  int64_t bf16;  // whether P is
};

// A tile of P = W + Σ s_r left_r right_r, every element's sum in the order of the ranks.
template <class Target, int64_t height>
inline void tile(const Product& job, int64_t row, int64_t column, int64_t width, const float* scales, int64_t rank) {
  float sums[height][WIDTH] = {};
  for (int64_t r = 0; r < rank; ++r) {
    const float* left = job.left + r * job.rows + row;
    const float* right = job.right + r * job.columns + column;
    for (int64_t i = 0; i < height; ++i) {
      const float factor = scales[r] * left[i];
      for (int64_t k = 0; k < width; ++k) sums[i][k] += factor * right[k];
    }
  }
  for (int64_t i = 0; i < height; ++i) {
    const int64_t start = (row + i) * job.columns + column;
    Target* target = static_cast<Target*>(job.target) + start;
    for (int64_t k = 0; k < width; ++k) {
      const float value = job.base[start + k] + sums[i][k];
      if constexpr (std::is_same_v<Target, float>) target[k] = value;
      else target[k] = rounded(value);
    }
  }
}

template <class Target, int64_t height>
void band(const Product& job, int64_t row, const float* scales, int64_t rank) {
  int64_t column = 0;
  for (; column + WIDTH <= job.columns; column += WIDTH) tile<Target, height>(job, row, column, WIDTH, scales, rank);
  if (column < job.columns) tile<Target, height>(job, row, column, job.columns - column, scales, rank);
}

template <class Target>
void superpose(const Product& job, int64_t row, const float* scales, int64_t rank) {
  if (row + HEIGHT <= job.rows) return band<Target, HEIGHT>(job, row, scales, rank);
  for (; row < job.rows; ++row) band<Target, 1>(job, row, scales, rank);
}

int64_t bands(const Product& job) { return (job.rows + HEIGHT - 1) / HEIGHT; }

}  // namespace

extern "C" void molf_superpose(const int64_t* table, int64_t count, int64_t threads, const float* scales, int64_t rank) {
  const std::vector<Product> jobs = read<Product>(table, count);
  std::vector<int64_t> first(count + 1, 0);  // the first band of each job
  for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + bands(jobs[i]);
#pragma omp parallel num_threads(threads)
  {
    int64_t i = 0;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < first[count]; ++p) {
      while (p >= first[i + 1]) ++i;
      const int64_t row = (p - first[i]) * HEIGHT;
      if (jobs[i].bf16) superpose<uint16_t>(jobs[i], row, scales, rank);
      else superpose<float>(jobs[i], row, scales, rank);
    }
  }
}

extern "C" void molf_pass(int64_t kind, const int64_t* table, int64_t count, int64_t threads, float lerp, float beta2,
                          float square, float eps, float inverse_root, const float* clip) {
  const std::vector<Job> jobs = read<Job>(table, count);
  const Numbers c{lerp, beta2, square, eps, inverse_root, clip ? *clip : 1};
  switch (static_cast<Kind>(kind)) {
    case SQUARES: return run<SQUARES>(jobs, c, threads);
    case EPD: return run<EPD>(jobs, c, threads);
    case PFN: return run<PFN>(jobs, c, threads);
    case UPDATE: return run<UPDATE>(jobs, c, threads);
    case UNROUTED: return run<UNROUTED>(jobs, c, threads);
  }
}
