// Entry point of prefix_attention on the CPU: new tokens into their pages, attention of all parts, merge.
//
// Sequences with many new tokens go block by block over all that they see. The others (decode) go run by run of shared
// tokens, read once for the rows of all members, and then over what each reads alone; parts of at most SPLIT tokens,
// by position, so that a result depends neither on the threads nor on the batch but for the rounding of a merge.
#include <optional>

#include "prefix_attention_matrix.h"
#include "prefix_attention_vector.h"

namespace limber {

// Vectors: what a row by itself is multiplied with. Matrices: products of blocks.
template <Dtype DTYPE, Dtype PAGES, class Vectors, class Matrices>
class PrefixAttentionForward {
  static constexpr int MANY = 16;    // new tokens
  static constexpr int MATRIX = 4;   // rows from which on a part is a product of blocks
  static constexpr int SPLIT = 512;  // tokens
  using Matrix = MatrixAttention<Matrices, DTYPE, PAGES>;
  using Vector = VectorAttention<Vectors, DTYPE, PAGES>;

 public:
  explicit PrefixAttentionForward(const PrefixAttentionParams& params) : p(params), bytes_(size_of(p.dtype)) {
    rows_.resize(p.T);
    for (int64_t n = 0; n < p.N; n++)
      for (int64_t t = p.queries[n]; t < p.queries[n + 1]; t++)
        rows_[t].limit = p.lengths[n] - (p.queries[n + 1] - 1 - t);
    plan();
    rotated_ = Buffer<char>(p.T * p.H * p.D * bytes_);
    sums_ = Buffer<float>((int64_t)slots_.size() * p.H * PartSums::floats(p.D));
  }

  void run() {
    // Tasks in runs: a thread that knows what comes next fetches it ahead. Every other thread taking them from the last
    // one on, so that products and waiting for memory overlap, made 32 members over 800 tokens 1.03x and 1.19x as fast
    // and two of them 0.91x and 0.78x (two runs each, Zen 4).
    const int64_t total = tasks_.size() * p.H, chunk = std::clamp<int64_t>(total / (8 * p.threads), 1, 4);
#pragma omp parallel num_threads(p.threads)
    {
      [[maybe_unused]] const typename Matrices::Session session;
#pragma omp for schedule(static)
      for (int64_t n = 0; n < p.N; n++)
        for (int64_t t = p.queries[n]; t < p.queries[n + 1]; t++) append(n, t);
      std::optional<Matrix> matrix;
      Vector vector(p);
      std::vector<PartSums> parts;
#pragma omp for schedule(dynamic, 1)
      for (int64_t at = 0; at < total; at += chunk)
        for (int64_t i = at, end = std::min(at + chunk, total); i < end; i++) {
          const Task& task = tasks_[i / p.H];
          const Tokens next = tokens(i + 1 < end ? i + 1 : i);
          if (task.slot >= 0 && task.count < MATRIX) {
            by_vector(task, i % p.H, vector, i + 1 < end ? &next : nullptr);
            continue;
          }
          if (!matrix) matrix.emplace(p);
          by_matrix(task, i % p.H, *matrix, i + 1 < end ? &next : nullptr);
        }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.T * p.H; i++) {
        const auto& slots = rows_[i / p.H].parts;
        if (slots.empty()) continue;  // a block wrote it
        parts.clear();
        for (const int32_t slot : slots) parts.push_back({sums(slot, i % p.H), p.D});
        merge(p.dtype, p.D, p.scale * (float)LOG2E, parts, (char*)p.out + i * p.D * bytes_);
      }
    }
  }

 private:
  struct Row {
    int64_t limit;  // tokens it sees
    std::vector<int32_t> parts;
  };
  struct Task {
    int64_t first, count, begin, end;  // rows listed from `first` on; tokens
    const int32_t* table;
    int64_t slot;  // of the first row, or -1: the rows see nothing else
  };

  void plan() {
    auto brings = [&](int64_t n) { return p.queries[n + 1] - p.queries[n]; };
    for (int64_t n = 0; n < p.N; n++) {
      if (brings(n) < MANY) continue;
      for (int64_t t = p.queries[n]; t < p.queries[n + 1]; t += Matrix::ROWS) {
        const int64_t count = std::min<int64_t>(Matrix::ROWS, p.queries[n + 1] - t);
        tasks_.push_back({(int64_t)listed_.size(), count, 0, rows_[t + count - 1].limit, table(n), -1});
        for (int64_t i = 0; i < count; i++) listed_.push_back((int32_t)(t + i));
      }
    }
    std::vector<int32_t> rows;
    for (int64_t s = 0; s < p.runs; s++) {
      const int32_t* run = p.shared + 5 * s;
      rows.clear();
      for (int64_t i = run[0]; i < run[1]; i++)
        for (int64_t n = p.order[i], t = p.queries[n]; brings(n) < MANY && t < p.queries[n + 1]; t++)
          rows.push_back((int32_t)t);
      part(rows, run[2], run[3], table(p.order[run[0]]));
    }
    for (int64_t n = 0; n < p.N; n++) {
      if (brings(n) >= MANY) continue;
      rows.clear();
      for (int64_t t = p.queries[n]; t < p.queries[n + 1]; t++) rows.push_back((int32_t)t);
      part(rows, p.alone[n], p.lengths[n], table(n));
    }
  }
  void part(const std::vector<int32_t>& rows, int64_t begin, int64_t end, const int32_t* table) {
    for (int64_t at = begin; at < end; at = (at / SPLIT + 1) * SPLIT)
      for (int64_t r = 0; r < (int64_t)rows.size(); r += Matrix::ROWS) {
        const int64_t count = std::min<int64_t>(Matrix::ROWS, rows.size() - r);
        tasks_.push_back({(int64_t)listed_.size(), count, at, std::min(end, (at / SPLIT + 1) * SPLIT), table,
                          (int64_t)slots_.size()});
        for (int64_t i = 0; i < count; i++) {
          listed_.push_back(rows[r + i]);
          rows_[rows[r + i]].parts.push_back((int32_t)slots_.size());
          slots_.push_back(rows[r + i]);
        }
      }
  }
  const int32_t* table(int64_t n) const { return p.page_table + n * p.table_width; }

  void append(int64_t n, int64_t t) {
    const int64_t token = rows_[t].limit - 1, width = p.H * p.D;
    const int64_t position = p.positions ? p.positions[t] : token;
    const float* angles = p.rotary ? p.rotary + position * p.rotary_dims : nullptr;
    const int64_t number = table(n)[token / p.page_size];
    for (int64_t h = 0; h < p.H; h++) {
      auto from = [&](const void* x, int64_t stride) { return (const char*)x + (t * stride + h * p.D) * bytes_; };
      const int64_t place = 2 * h * p.page_size + token % p.page_size;
      char* key = (char*)p.pages + (number * p.page_stride + place * p.D) * size_of(PAGES);
      char* value = key + p.page_size * p.D * size_of(PAGES);
      rotate(p.dtype, from(p.q, p.q_stride), rotated_ + (t * width + h * p.D) * bytes_, p.D, angles, dims());
      if constexpr (PAGES == Dtype::i8) {
        float* scale = p.page_scales + number * p.page_scales_stride + place;
        alignas(64) char turned[MAX_HEAD_DIM * sizeof(float)];
        rotate(p.dtype, from(p.k, p.k_stride), turned, p.D, angles, dims());
        quantise(p.dtype, turned, (int8_t*)key, scale[0], p.D);
        quantise(p.dtype, from(p.v, p.v_stride), (int8_t*)value, scale[p.page_size], p.D);
      } else {
        rotate(p.dtype, from(p.k, p.k_stride), key, p.D, angles, dims());
        std::memcpy(value, from(p.v, p.v_stride), p.D * bytes_);
      }
    }
  }
  int64_t dims() const { return p.rotary ? p.rotary_dims : 0; }

  Tokens tokens(const Task& task, int64_t h) const { return {p, task.table, h, task.begin, task.end}; }
  Tokens tokens(int64_t i) const { return tokens(tasks_[i / p.H], i % p.H); }
  const void* query(int64_t t, int64_t h) const { return rotated_ + (t * p.H + h) * p.D * bytes_; }
  float* sums(int64_t slot, int64_t h) const { return sums_ + (slot * p.H + h) * PartSums::floats(p.D); }

  void by_matrix(const Task& task, int64_t h, Matrix& matrix, const Tokens* next) {
    const void* q[Matrix::ROWS];
    float limit[Matrix::ROWS];
    for (int64_t i = 0; i < task.count; i++) {
      const int64_t t = listed_[task.first + i];
      q[i] = query(t, h), limit[i] = (float)rows_[t].limit;
    }
    matrix.run(q, limit, (int)task.count, tokens(task, h), next);
    for (int64_t i = 0; i < task.count; i++) {
      const float* o = matrix.sums((int)i);
      if (task.slot < 0) {
        char* out = (char*)p.out + (listed_[task.first + i] * p.H + h) * p.D * bytes_;
        const simd::vec inverse = simd::set1(1.f / matrix.sum((int)i));
        for (int64_t d = 0; d < p.D; d += simd::W)
          store_from_float(p.dtype, out, d, simd::mul(simd::load(o + d), inverse), p.D - d);
      } else {
        const PartSums part{sums(task.slot + i, h), p.D};
        std::memcpy(part.base, o, p.D * sizeof(float));
        part.maximum() = matrix.maximum((int)i), part.sum() = matrix.sum((int)i);
      }
    }
  }
  void by_vector(const Task& task, int64_t h, Vector& vector, const Tokens* next) {
    const void* q[MATRIX];
    float limit[MATRIX];
    float* parts[MATRIX];
    for (int64_t i = 0; i < task.count; i++) {
      const int64_t t = listed_[task.first + i];
      q[i] = query(t, h), limit[i] = (float)rows_[t].limit, parts[i] = sums(task.slot + i, h);
    }
    vector.run(q, limit, (int)task.count, tokens(task, h), next, parts);
  }

  const PrefixAttentionParams& p;
  const int64_t bytes_;
  std::vector<Row> rows_;
  std::vector<Task> tasks_;
  std::vector<int32_t> listed_, slots_;
  Buffer<char> rotated_;
  Buffer<float> sums_;
};

void prefix_attention_fwd(const PrefixAttentionParams& p) {
  if (!p.T) return;
#if defined(LIMBER_ISA_AMX)
  using Wide = Split<3>;  // fp16 too: of two parts the product of the small ones is dropped, 0.1 of a logit of 1e4
#else
  using Wide = F32;
#endif
#if defined(LIMBER_BF16_PAIRS)
  using Bf16 = BF16;
#else
  using Bf16 = F32;
#endif
  const auto run = [&](auto dtype, auto vectors, auto matrices) {
    constexpr Dtype DTYPE = decltype(dtype)::value;
    using Matrices = decltype(matrices);
    // A key in int8 is as fast in fp32: widened either way.
    if (p.page_dtype == Dtype::i8)
      PrefixAttentionForward<DTYPE, Dtype::i8, F32, Matrices>(p).run();
    else
      PrefixAttentionForward<DTYPE, DTYPE, decltype(vectors), Matrices>(p).run();
  };
  if (p.dtype == Dtype::bf16) return run(std::integral_constant<Dtype, Dtype::bf16>{}, Bf16{}, Bf16{});
  if (p.dtype == Dtype::f16) return run(std::integral_constant<Dtype, Dtype::f16>{}, F32{}, Wide{});
  run(std::integral_constant<Dtype, Dtype::f32>{}, F32{}, Wide{});
}

}  // namespace limber
