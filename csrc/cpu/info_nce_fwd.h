// Forward of info_nce: one pass over the strips of x gives every row's and every column's log-sum-exp, loss and d loss
// / d scale.
//
// A task owns up to CHUNK rows (their sums are final when it ends) and sums columns privately; up to GROUP tasks later
// the private column sums are merged in task order. So the result does not depend on the number of threads. FLOP: 2 N
// (M + K) D.
#pragma once
#include <omp.h>

#include "info_nce_common.h"

namespace limber {

// 2^n for an integer n <= 0.
inline float exp2_integer(float n) {
  if (!(n >= -126.f)) return exp2f(n);
  const uint32_t bits = (uint32_t)((int)n + 127) << 23;
  float p;
  std::memcpy(&p, &bits, 4);
  return p;
}

// sum 2^(x - shift) and sum 2^(x - shift) (x - shift); the second gives d lse / d scale around the maximum, free of
// common offsets. Shifts are integers.
struct Sums {
  float *shift, *sum, *xsum;
  Sums at(int64_t k) const { return {shift + k, sum + k, xsum + k}; }
  void clear(int64_t n) const {
    for (int64_t i = 0; i < n; i++) shift[i] = -INFINITY, sum[i] = xsum[i] = 0.f;
  }
  void merge(int64_t i, float m, float s, float x) const {
    if (s == 0.f) return;
    float M = shift[i], S = sum[i], X = xsum[i];
    if (S == 0.f) {
      M = m, S = s, X = x;
    } else {
      if (m > M) {
        float g = exp2_integer(M - m);
        X = g == 0.f ? 0.f : (X + S * (M - m)) * g;
        S *= g;
        M = m;
      } else if (m < M) {
        float g = exp2_integer(m - M);
        x = g == 0.f ? 0.f : (x + s * (m - M)) * g;
        s *= g;
      }
      S += s, X += x;
    }
    if (!(S > LEAST && S < MOST) && S > 0.f && S < INFINITY) {
      int e;
      float S0 = S;
      S = frexpf(S, &e);
      X = ldexpf(X - S0 * e, -e);
      M += e;
    }
    shift[i] = M, sum[i] = S, xsum[i] = X;
  }
  // The same for 0 .. n-1, a vector at a time: one by one they were half of the forward at N = 256, D = 64.
  void merge(int64_t n, const Sums& other) const {
    for (int64_t j = 0; j < n; j += simd::W)
      if (n - j < simd::W || !merge_vector(at(j), other.at(j)))
        for (int64_t i = j; i < std::min(n, j + simd::W); i++) merge(i, other.shift[i], other.sum[i], other.xsum[i]);
  }

 private:
  static constexpr float LEAST = 1e-10f, MOST = 1e10f;  // sums beyond are rescaled
  // False, and nothing done, where a lane is to be rescaled, has a huge shift, or is not finite.
  static bool merge_vector(const Sums& a, const Sums& b) {
    const simd::vec s = simd::loadu(b.sum), S = simd::loadu(a.sum), zero = simd::zero();
    const simd::mask some = simd::less(zero, s), had = simd::less(zero, S);
    const simd::vec m = simd::loadu(b.shift), M = simd::select(had, simd::loadu(a.shift), m), hi = simd::max(M, m);
    const simd::vec dM = simd::sub(M, hi), dm = simd::sub(m, hi), one = simd::set1(1.f);
    const simd::vec G = simd::ldexp(one, dM), g = simd::ldexp(one, dm);
    const simd::vec sum = simd::fma(S, G, simd::mul(s, g));
    const simd::vec xsum =
        simd::fma(simd::fma(S, dM, simd::loadu(a.xsum)), G, simd::mul(simd::fma(s, dm, simd::loadu(b.xsum)), g));
    auto all = [](simd::vec x, float bound) { return simd::count(simd::less(x, simd::set1(bound))) == simd::W; };
    const simd::vec checked = simd::select(some, sum, one), size = simd::abs(simd::select(some, hi, zero));
    if (!all(simd::abs(s), INFINITY) || !all(simd::sub(zero, checked), -LEAST) || !all(checked, MOST) ||
        !all(size, 1e6f))
      return false;
    simd::storeu(a.shift, simd::select(some, hi, simd::loadu(a.shift)));
    simd::storeu(a.sum, simd::select(some, sum, S));
    simd::storeu(a.xsum, simd::select(some, xsum, simd::loadu(a.xsum)));
    return true;
  }
};

// Best negative (top-1) and plain sum of the negatives (label smoothing): only when asked for.
struct Extras {
  float* best = nullptr;
  double* total = nullptr;
  int32_t* live = nullptr;
  Extras at(int64_t k) const { return best ? Extras{best + k, total + k, live + k} : *this; }
  void clear(int64_t n) const {
    for (int64_t i = 0; best && i < n; i++) best[i] = -INFINITY, total[i] = 0, live[i] = 0;
  }
  void merge(int64_t i, float b, double t, int n) const { best[i] = std::max(best[i], b), total[i] += t, live[i] += n; }
};

template <class Op>
class InfoNceForward {
  using B = Blocks<Op>;
  static constexpr int NB = B::NB, LDS = B::LDS, MR = Op::MR;
  // Sums of 2^(x - shift) are exact to fp32 while no row's or column's own maximum lies 90 bits below the shared shift.
  static constexpr float SPAN = 90.f;
  static constexpr int64_t COLUMNS = 64;  // whose sums one thread merges at a time
  static constexpr int64_t RESIDENT = Op::TILES ? 1 << 20 : 448 << 10, STRIPS = Op::TILES ? 4 : 8;

 public:
  explicit InfoNceForward(const InfoNceParams& params)
      : p(params),
        cols(p, block_size<Op>(p.D, PANEL_BUDGET, NR, B::columns(p))),
        negatives(p),
        cache(p),
        alpha(log2_scale(p)),
        logits(alpha),
        Kd(dwords<Op>(p.D)),
        // Of few rows each thread gets the same share to within a strip or two: 3 to 9% of the forward at N = 256. More
        // rows are spread evenly over tasks in eights: of 17 at N = 2048 two threads do 9 and 8. (Few are not: a task
        // more merges its sums once more, 4% of AVX2's forward at N = 512.)
        share(std::min<int64_t>(ceil_div(p.N, MR * (p.N <= 512 ? 32 : 16)), B::CHUNK / MR)),
        spread(p.N <= 512 ? round_up(ceil_div(p.N, MR), share) : ceil_div(p.N, MR)),
        tasks(p.N <= 512 ? spread / share : std::min(spread, round_up(ceil_div(spread, share), 8))) {}

  void run() {
    const int64_t super = cols.super_block(Kd * 4), width = super * cols.NB, groups = ceil_div(tasks, B::GROUP),
                  group = ceil_div(tasks, groups);
    const bool extras = p.row_correct || p.label_smoothing > 0;
    advise_huge_pages(p.cache, p.cache_bytes);
    panels = Buffer<float>(width * Kd);
    Buffer<float> norms(p.normalize ? p.N + p.M + p.K : 0), sums(3 * group * width), scratch(p.threads * per_thread());
    Buffer<float> best(extras ? p.N + p.M + group * width : 0);
    Buffer<double> total(extras ? p.N + p.M + group * width : 0);
    Buffer<int32_t> live(extras ? p.N + p.M + group * width : 0);
    auto carve = [](float* at, int64_t n) { return Sums{at, at + n, at + 2 * n}; };
    auto carve_extras = [&](int64_t at) { return extras ? Extras{best + at, total + at, live + at} : Extras{}; };
    // Sums and the positives' dots (in DSCALE) lie in the fields of the state that they become.
    const Sums row = carve(p.row_state, p.N), col = carve(p.col_state, p.columns ? p.M : 0);
    const Extras row_x = carve_extras(0), col_x = carve_extras(p.N);
    row.clear(p.N), row_x.clear(p.N), col_x.clear(p.M);
    if (p.columns) col.clear(p.M), std::fill_n(p.col_state + DSCALE * p.M, p.M, NAN);
    images = image_rows(p, p.normalize ? norms.get() : nullptr);
    texts = text_rows(p, p.normalize ? norms + p.N : nullptr);

#pragma omp parallel num_threads(p.threads)
    {
      [[maybe_unused]] const typename Op::Session session;
      float* mine = scratch + omp_get_thread_num() * per_thread();
      if (p.normalize) {
        row_norms(images, norms);
        row_norms(texts, norms + p.N);
      }
      for (int64_t b0 = 0; b0 < cols.count; b0 += super) {
        const int64_t b1 = std::min(b0 + super, cols.count);
        cols.template pack<Op>(texts, b0, b1, panels);
        for (int64_t g = 0; g < groups; g++) {
          const int64_t t0 = tasks * g / groups, t1 = tasks * (g + 1) / groups;
          // A unit's tasks run side by side, against the same column block. Their results do not
          // depend on it.
          const int64_t units = p.threads * ceil_div(t1 - t0, p.threads * (B::CHUNK / MR / share));
          auto unit = [&](int64_t u) { return t0 + (t1 - t0) * u / units; };
          auto task_sums = [&](int64_t t) { return carve(sums + 3 * (t - t0) * width, width); };
          auto task_extras = [&](int64_t t) { return carve_extras(p.N + p.M + (t - t0) * width); };
#pragma omp for schedule(dynamic, 1)
          for (int64_t u = 0; u < units; u++) {
            for (int64_t t = unit(u); t < unit(u + 1); t++) task_sums(t).clear(width), task_extras(t).clear(width);
            run_tasks(unit(u), unit(u + 1), b0, b1, row, task_sums, row_x, task_extras, mine);
          }
          if (p.columns)
#pragma omp for schedule(static)
            for (int64_t j = b0 * cols.NB; j < std::min(b1 * cols.NB, p.M); j += COLUMNS) {
              const int64_t n = std::min({COLUMNS, b1 * cols.NB - j, p.M - j}), at = j - b0 * cols.NB;
              for (int64_t t = t0; t < t1; t++) {
                col.at(j).merge(n, task_sums(t).at(at));
                for (int64_t i = at; extras && i < at + n; i++) {
                  const Extras x = task_extras(t).at(i);
                  col_x.merge(b0 * cols.NB + i, *x.best, *x.total, *x.live);
                }
              }
            }
        }
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.N; i++) finish(p.row_state, p.row_correct, p.N, i, row_x);
      if (p.columns)
#pragma omp for schedule(static)
        for (int64_t j = 0; j < p.M; j++) finish(p.col_state, p.col_correct, p.M, j, col_x);
    }
  }

 private:
  int64_t per_thread() const { return round_up(STRIPS * MR * LDS + 3 * NB + B::CHUNK * Kd, 16); }

  int64_t first_row(int64_t task) const { return std::min(spread * task / tasks * MR, p.N); }

  // Tasks t0 .. t1-1 against column blocks b0 .. b1-1.
  template <class SumsOf, class ExtrasOf>
  void run_tasks(int64_t t0, int64_t t1, int64_t b0, int64_t b1, Sums row, SumsOf sums_of, Extras row_x,
                 ExtrasOf extras_of, float* scratch) {
    const int64_t i0 = first_row(t0), i1 = first_row(t1);
    float *strips = scratch, *csum = strips + STRIPS * MR * LDS, *cxsum = csum + NB, *cshift = cxsum + NB,
          *A = cshift + NB;
    pack_rows<Op>(images, i0, i1, A);
    // A column block beyond L2 is read in parts of k, each for several strips.
    const int64_t deep = std::min(Kd, round_up(RESIDENT / (4 * cols.NB), Op::TILES ? 16 * Op::PARTS : 128)),
                  high = deep < Kd ? STRIPS * MR : MR;
    for (int64_t b = b0; b < b1; b++) {
      const int64_t j0 = cols.begin(b), nb = cols.size(b), at = (b - b0) * cols.NB;
      int64_t task = t0;
      float shift = NAN;
      Sums col{};
      Extras col_x;
      bool open = false;  // csum, cxsum hold column sums under `shift`
      auto flush = [&] {
        if (!open) return;
        std::fill_n(cshift, nb, shift);
        col.merge(nb, Sums{cshift, csum, cxsum});
        open = false;
      };
      for (int64_t i = i0; i < i1; i += MR) {
        const int R = (int)std::min<int64_t>(MR, i1 - i);
        float* strip = strips + (i - i0) % high * LDS;
        for (int64_t k = 0; (i - i0) % high == 0 && k < Kd; k += deep)
          for (int64_t s = i; s < std::min(i + high, i1); s += MR)
            dot_strip<Op>(strips + (s - i) * LDS, (int)std::min<int64_t>(MR, i1 - s), Kd, A + (s - i0) * Kd,
                          panels + at * Kd, nb, k, std::min(k + deep, Kd));
        if (i == first_row(task)) flush(), col = sums_of(task).at(at), col_x = extras_of(task).at(at), task++;
        take_positives(strip, R, i, j0, nb);
        const bool whole = negatives.whole_tile(i, R, j0, nb);
        const int64_t slot = cache.index(b, i);
        auto* tile = slot >= 0 ? cache.tiles + slot * cache.TILE : nullptr;
        if (row_x.best)
          whole ? extra_sums<true>(strip, R, i, j0, nb, row_x, col_x)
                : extra_sums<false>(strip, R, i, j0, nb, row_x, col_x);
        if (p.sigmoid) {
          if (tile) cache.shifts[slot] = 0.f;
          sigmoid_sums(strip, R, i, j0, nb, row, tile);
          continue;
        }
        auto [lo, hi] = whole ? range<true>(strip, R, i, j0, nb) : range<false>(strip, R, i, j0, nb);
        if (lo > hi) {  // no negatives in this tile
          if (tile) {
            cache.shifts[slot] = 0.f;
            for (int64_t k = 0; k < cache.TILE; k += simd::W) cache.store(tile + k, simd::zero());
          }
          continue;
        }
        // The shift is an integer, kept from strip to strip until the maximum has moved by 30 bits.
        if (open && !(std::fabs(hi - shift) <= 30.f)) flush();
        if (!open) {
          shift = rintf(hi), open = true;
          std::memset(csum, 0, 2 * NB * sizeof(float));
        }
        const bool large = !(std::fabs(lo) < LARGE_LOGIT && std::fabs(hi) < LARGE_LOGIT);
        if (!large && (lo > shift - SPAN || maxima_above(strip, R, i, j0, nb, shift - SPAN))) {
          if (tile) cache.shifts[slot] = shift;
          whole ? shared_sums<true>(strip, R, i, j0, nb, shift, row, csum, cxsum, tile)
                : shared_sums<false>(strip, R, i, j0, nb, shift, row, csum, cxsum, tile);
        } else {
          if (tile) cache.shifts[slot] = NAN;
          separate_sums(strip, R, i, j0, nb, row, col);
        }
      }
      flush();
    }
  }

  void take_positives(const float* strip, int R, int64_t i, int64_t j0, int64_t nb) {
    for (int r = 0; r < R; r++) {
      const int64_t d = negatives.positive(i + r) - j0;
      if (d < 0 || d >= nb) continue;
      p.row_state[DSCALE * p.N + i + r] = strip[r * LDS + d];
      if (p.columns) p.col_state[DSCALE * p.M + j0 + d] = strip[r * LDS + d];  // labels are a permutation: one writer
    }
  }

  // Calls f(r, j, lanes, dot) for every vector of the strip.
  template <bool WHOLE, class F>
  void each(const float* strip, int R, int64_t i, int64_t j0, int64_t nb, F f) const {
    for (int r = 0; r < R; r++)
      for (int64_t j = 0; j < nb; j += simd::W)
        f(r, j, WHOLE ? simd::first(simd::W) : negatives.lanes(i + r, j0 + j, nb - j), simd::load(strip + r * LDS + j));
  }

  template <bool WHOLE>
  std::pair<float, float> range(const float* strip, int R, int64_t i, int64_t j0,
                                int64_t nb) const {  // of the negatives' x
    simd::vec hi = simd::set1(-INFINITY), lo = simd::set1(INFINITY);
    each<WHOLE>(strip, R, i, j0, nb, [&](int, int64_t, simd::mask m, simd::vec v) {
      hi = simd::max(hi, WHOLE ? v : simd::select(m, v, hi));
      lo = simd::min(lo, WHOLE ? v : simd::select(m, v, lo));
    });
    const float a = (float)alpha, x = simd::hmin(lo) * a, y = simd::hmax(hi) * a;
    return a < 0 ? std::pair{y, x} : std::pair{x, y};
  }

  bool maxima_above(const float* strip, int R, int64_t i, int64_t j0, int64_t nb,
                    float floor) const {  // every row's and column's own
    const simd::vec none = simd::set1(-INFINITY), a = simd::set1((float)alpha);
    auto low = [&](float m) { return !(m > floor) && m != -INFINITY; };  // -inf: nothing to sum
    for (int r = 0; r < R; r++) {
      simd::vec m = none;
      for (int64_t j = 0; j < nb; j += simd::W)
        m = simd::max(m, simd::select(negatives.lanes(i + r, j0 + j, nb - j),
                                      simd::mul(a, simd::load(strip + r * LDS + j)), none));
      if (low(simd::hmax(m))) return false;
    }
    for (int64_t j = 0; j < nb; j += simd::W) {
      simd::vec m = none;
      for (int r = 0; r < R; r++)
        m = simd::max(m, simd::select(negatives.lanes(i + r, j0 + j, nb - j),
                                      simd::mul(a, simd::load(strip + r * LDS + j)), none));
      alignas(64) float lane[simd::W];
      simd::store(lane, m);
      for (int k = 0; k < simd::W; k++)
        if (low(lane[k])) return false;
    }
    return true;
  }

  // One exponential per element under a shift shared by the tile serves row sums, column sums and the backward's tile.
  template <bool WHOLE>
  void shared_sums(const float* strip, int R, int64_t i, int64_t j0, int64_t nb, float shift, Sums row, float* csum,
                   float* cxsum, typename TileCache<Op>::elem* tile) const {
    constexpr int H = Op::TILES ? 8 : MR / 2;  // row sums of so many rows stay in registers
    int r = 0;
    for (; r + H <= R; r += H) shared_rows<WHOLE, H>(strip, r, i + r, j0, nb, shift, row, csum, cxsum, tile);
    for (; r < R; r++) shared_rows<WHOLE, 1>(strip, r, i + r, j0, nb, shift, row, csum, cxsum, tile);
  }
  template <bool WHOLE, int H>
  void shared_rows(const float* strip, int r0, int64_t i, int64_t j0, int64_t nb, float shift, Sums row, float* csum,
                   float* cxsum, typename TileCache<Op>::elem* tile) const {
    const simd::vec vshift = simd::set1(shift);
    const Logits<Op> lg = logits;
    simd::vec s[H], xs[H];
    for (int r = 0; r < H; r++) s[r] = xs[r] = simd::zero();
    for (int64_t j = 0; j < nb; j += simd::W) {
      simd::vec c = simd::load(csum + j), cx = simd::load(cxsum + j);
#pragma GCC unroll 8
      for (int r = 0; r < H; r++) {
        simd::vec n, f;
        lg.split_bounded(simd::load(strip + (r0 + r) * LDS + j), n, f);
        n = simd::sub(n, vshift);
        simd::vec e = simd::ldexp(exp2_fraction<Op::EXP2_DEGREE>(f), n), t = simd::add(n, f);
        if (!WHOLE) {
          simd::mask m = negatives.lanes(i + r, j0 + j, nb - j);
          e = simd::select(m, e, simd::zero()), t = simd::select(m, t, simd::zero());
        }
        s[r] = simd::add(s[r], e), xs[r] = simd::fma(e, t, xs[r]);
        c = simd::add(c, e), cx = simd::fma(e, t, cx);
        if (tile) cache.store(tile + (r0 + r) * NB + j, e);
      }
      simd::store(csum + j, c), simd::store(cxsum + j, cx);
    }
    for (int r = 0; r < H; r++) row.merge(i + r, shift, simd::sum(s[r]), simd::sum(xs[r]));
  }

  // Two exponentials, every row and column under its own shift: for tiles that span more than SPAN bits, infinite or
  // NaN ones.
  void separate_sums(const float* strip, int R, int64_t i, int64_t j0, int64_t nb, Sums row, Sums col) const {
    const simd::vec none = simd::set1(-INFINITY), va = simd::set1((float)alpha);
    auto x_of = [&](simd::mask m, simd::vec dot) { return simd::select(m, simd::mul(dot, va), none); };
    auto add = [&](simd::mask m, simd::vec dot, simd::vec shift, simd::vec& s, simd::vec& xs) {
      m = simd::andnot(m, simd::less(simd::mul(dot, va), simd::set1(-3e38f)));  // 2^-inf is 0; NaN stays
      simd::vec n, f;
      logits.split(dot, n, f);
      n = simd::sub(n, shift);
      const simd::vec e = simd::select(m, simd::ldexp(exp2_fraction<6>(f), n), simd::zero());
      s = simd::add(s, e), xs = simd::add(xs, simd::select(m, simd::mul(e, simd::add(n, f)), simd::zero()));
    };
    auto shift_of = [](float hi) { return hi == -INFINITY ? 0.f : rintf(hi); };
    for (int r = 0; r < R; r++) {
      simd::vec hi = none, s = simd::zero(), xs = s;
      for (int64_t j = 0; j < nb; j += simd::W)
        hi = simd::max(hi, x_of(negatives.lanes(i + r, j0 + j, nb - j), simd::load(strip + r * LDS + j)));
      const float shift = shift_of(simd::hmax(hi));
      for (int64_t j = 0; j < nb; j += simd::W)
        add(negatives.lanes(i + r, j0 + j, nb - j), simd::load(strip + r * LDS + j), simd::set1(shift), s, xs);
      row.merge(i + r, shift, simd::sum(s), simd::sum(xs));
    }
    for (int64_t j = 0; j < nb; j += simd::W) {
      simd::vec hi = none, s = simd::zero(), xs = s;
      for (int r = 0; r < R; r++)
        hi = simd::max(hi, x_of(negatives.lanes(i + r, j0 + j, nb - j), simd::load(strip + r * LDS + j)));
      alignas(64) float m[simd::W], sum[simd::W], xsum[simd::W];
      simd::store(m, hi);
      for (float& v : m) v = shift_of(v);
      for (int r = 0; r < R; r++)
        add(negatives.lanes(i + r, j0 + j, nb - j), simd::load(strip + r * LDS + j), simd::load(m), s, xs);
      simd::store(sum, s), simd::store(xsum, xs);
      for (int k = 0; k < simd::W && j + k < nb; k++) col.merge(j + k, m[k], sum[k], xsum[k]);
    }
  }

  // softplus(-z x) and sigma(x) - [positive], in nats; row.shift, sum, xsum collect d loss / d bias, loss, d loss / d
  // scale.
  void sigmoid_sums(const float* strip, int R, int64_t i, int64_t j0, int64_t nb, Sums row,
                    typename TileCache<Op>::elem* tile) const {
    const simd::vec scale = simd::set1((float)p.scale), bias = simd::set1((float)p.bias), zero = simd::zero(),
                    one = simd::set1(1.f);
    for (int r = 0; r < R; r++) {
      simd::vec loss = zero, dscale = zero, dbias = zero;
      for (int64_t j = 0; j < nb; j += simd::W) {
        const simd::vec dot = simd::load(strip + r * LDS + j), x = simd::fma(dot, scale, bias);
        const simd::mask neg = negatives.lanes(i + r, j0 + j, nb - j),
                         pos = simd::lane(negatives.positive(i + r) - j0 - j);
        const simd::vec y = simd::select(pos, simd::sub(zero, x), x);  // softplus(y), d = +-sigma(y)
        const simd::vec e = exp_nonpositive(simd::sub(zero, simd::abs(y))), q = simd::div(one, simd::add(one, e));
        simd::vec l = simd::add(simd::max(y, zero), log1p_unit(e)),
                  d = simd::select(simd::less(y, zero), simd::mul(e, q), q);
        const simd::mask live = simd::either(neg, pos);
        d = simd::select(live, simd::select(pos, simd::sub(zero, d), d), zero);
        loss = simd::add(loss, simd::select(live, l, zero));
        dscale = simd::add(dscale, simd::select(live, simd::mul(d, dot), zero));
        dbias = simd::add(dbias, d);
        if (tile) cache.store(tile + r * NB + j, d);
      }
      if (row.shift[i + r] == -INFINITY) row.shift[i + r] = 0.f;
      row.shift[i + r] += simd::sum(dbias), row.sum[i + r] += simd::sum(loss), row.xsum[i + r] += simd::sum(dscale);
    }
  }

  template <bool WHOLE>
  void extra_sums(const float* strip, int R, int64_t i, int64_t j0, int64_t nb, Extras row, Extras col) const {
    const simd::vec none = simd::set1(-INFINITY), a = simd::set1((float)alpha);
    for (int64_t j = 0; j < nb; j += simd::W) {
      simd::vec best = none, total = simd::zero();
      alignas(64) float cb[simd::W], ct[simd::W], cn[simd::W];
      simd::vec live = simd::zero();
      for (int r = 0; r < R; r++) {
        const simd::mask m = WHOLE ? simd::first(simd::W) : negatives.lanes(i + r, j0 + j, nb - j);
        const simd::vec x = simd::mul(a, simd::load(strip + r * LDS + j)), kept = simd::select(m, x, simd::zero());
        const simd::vec b = simd::select(m, x, none);
        best = simd::max(best, b), total = simd::add(total, kept),
        live = simd::add(live, simd::select(m, simd::set1(1.f), simd::zero()));
        row.merge(i + r, simd::hmax(b), simd::sum(kept), simd::count(m));
      }
      simd::store(cb, best), simd::store(ct, total), simd::store(cn, live);
      for (int k = 0; k < simd::W && j + k < nb; k++) col.merge(j + k, cb[k], ct[k], (int)cn[k]);
    }
  }

  // Sums of one row (or column) and its positive's dot -> the state that the caller sees, in place.
  void finish(float* state, uint8_t* correct, int64_t n, int64_t i, Extras extra) const {
    auto field = [&](int k) -> float& { return state[k * n + i]; };
    const float shift = field(0), sum = field(1), xsum = field(2), positive = field(DSCALE);
    double loss, dscale;
    if (p.sigmoid) {
      field(DBIAS) = shift, field(LSE_REMAINDER) = 0.f;
      loss = sum, dscale = xsum;
    } else {
      const double S = sum, M = S == 0 ? 0 : shift, x = Logits<Op>::scalar(alpha, positive);
      const double ratio = S == 0 ? 0 : S * std::exp2(M - x);  // negatives : positive
      double nll, unit, base,
          rest;  // unit: probability per unit of S; log-sum-exp = base + rest, whose sum could lose digits
      if (ratio < 1e300) {
        nll = std::log1p(ratio) + 0 * x;  // an infinite positive gives NaN, as in eager
        unit = S == 0 ? 0 : ratio / ((1 + ratio) * S);
        base = x, rest = nll / LN2;
      } else {
        base = M, rest = std::log2(S);
        nll = ratio != ratio ? ratio : LN2 * (M - x + rest);
        unit = 1 / S;
      }
      const float whole = (float)std::rint(base + rest);
      field(LSE_EXPONENT) = whole, field(LSE_REMAINDER) = (float)((base - whole) + rest);
      loss = nll;
      dscale = S == 0 ? 0 * nll : (xsum + S * (M - x)) * unit / alpha;
      if (p.label_smoothing > 0) {
        const double count = extra.live[i] + 1, gap = x - (extra.total[i] + x) / count;
        field(NLL) = (float)nll, field(UNIFORM) = (float)(p.label_smoothing / count);
        loss += p.label_smoothing * gap * LN2;
        dscale += p.label_smoothing * gap / alpha;
      }
    }
    field(LOSS) = (float)loss, field(DSCALE) = (float)dscale;
    if (correct) correct[i] = loss == loss && (float)alpha * positive > extra.best[i];
  }

  const InfoNceParams& p;
  const Columns cols;
  const Negatives negatives;
  const TileCache<Op> cache;
  const double alpha;
  const Logits<Op> logits;
  const int64_t Kd, share, spread, tasks;  // at most `share` strips of `spread` to a task
  Rows images, texts;
  Buffer<float> panels;
};

}  // namespace limber
