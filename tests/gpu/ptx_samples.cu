// Kernels that the PTX executor is tried on: what nvcc emits and Triton does not.
#include <cuda_bf16.h>
#include <stdint.h>

struct ScaleParams {
  const float* x;
  float* out;
  int64_t n;
  float factor;
  int8_t shift;
};

// A struct passed by value, a grid-stride loop, threads that leave early.
extern "C" __global__ void scale(ScaleParams p) {
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < p.n; i += int64_t(gridDim.x) * blockDim.x)
    p.out[i] = p.x[i] * p.factor + p.shift;
}

// Dynamic shared memory, a tree of barriers under divergence, an atomic.
extern "C" __global__ void block_sum(const float* x, float* out, int n) {
  extern __shared__ float sums[];
  float sum = 0.f;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int d = blockDim.x / 2; d; d >>= 1) {
    if (threadIdx.x < d) sums[threadIdx.x] += sums[threadIdx.x + d];
#ifndef WITHOUT_BARRIER
    __syncthreads();
#endif
  }
  if (threadIdx.x == 0) atomicAdd(out, sums[0]);
}

// A warp per row: shuffles, exponentials, a ballot, packed bf16, rows that some warps of a block do not have.
extern "C" __global__ void row_softmax(const __nv_bfloat162* x, float* out, int* positives, int rows, int pairs) {
  int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const __nv_bfloat162* source = x + int64_t(row) * pairs;
  float top = -INFINITY, sum = 0.f;
  int count = 0;
  for (int i = lane; i < pairs; i += 32) {
    float2 v = __bfloat1622float2(source[i]);
    top = fmaxf(top, fmaxf(v.x, v.y));
  }
  for (int d = 16; d; d >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
  for (int i = lane; i < pairs; i += 32) {
    float2 v = __bfloat1622float2(source[i]);
    sum += __expf(v.x - top) + __expf(v.y - top);
  }
  for (int d = 1; d < 32; d <<= 1) sum += __shfl_xor_sync(~0u, sum, d);
  for (int i = 0; i < pairs; i += 32) {
    bool inside = i + lane < pairs;
    float2 v = inside ? __bfloat1622float2(source[i + lane]) : make_float2(-1.f, -1.f);
    count += __popc(__ballot_sync(~0u, v.x > 0)) + __popc(__ballot_sync(~0u, v.y > 0));
    if (!inside) continue;
    float2 p = make_float2(__expf(v.x - top) / sum, __expf(v.y - top) / sum);
    reinterpret_cast<float2*>(out)[int64_t(row) * pairs + i + lane] = p;
  }
  if (lane == 0) positives[row] = count;
}

// A local array indexed at run time, generic addresses, integer division, a switch.
extern "C" __global__ void histogram_digits(const int* x, int* out, int n) {
  __shared__ int counts[10];
  if (threadIdx.x < 10) counts[threadIdx.x] = 0;
  __syncthreads();
  int mine[10] = {};
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    for (int v = x[i]; v; v /= 10) mine[v % 10]++;
  for (int d = 0; d < 10; ++d)
    if (mine[d]) atomicAdd(&counts[d], mine[d]);
  __syncthreads();
  // A pointer into one memory or the other, known only at run time.
  int* target = threadIdx.x % 2 ? counts : out;
  if (threadIdx.x < 10) {
    *(target + threadIdx.x) = counts[threadIdx.x];
    out[threadIdx.x] = target[threadIdx.x];
  }
}

__device__ void copy16(void* shared, const void* global) {
  uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global));
}

// One warp, c[16, 8] = a[16, k] b[8, k]^T: cp.async, ldmatrix, mma.sync by inline assembly.
extern "C" __global__ void warp_matmul(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int k) {
  __shared__ __align__(16) __nv_bfloat16 left[16][24], right[8][24];
  int lane = threadIdx.x;
  float sums[4] = {};
  for (int start = 0; start < k; start += 16) {
    copy16(&left[lane / 2][lane % 2 * 8], a + lane / 2 * k + start + lane % 2 * 8);
    if (lane < 16) copy16(&right[lane / 2][lane % 2 * 8], b + lane / 2 * k + start + lane % 2 * 8);
    asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
    __syncwarp();
    uint32_t x[4], y[2];
    uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(&left[lane % 16][lane / 16 * 8]));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from));
    from = static_cast<uint32_t>(__cvta_generic_to_shared(&right[lane % 8][lane / 8 % 2 * 8]));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(y[0]), "=r"(y[1]) : "r"(from));
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
    __syncwarp();
  }
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}
