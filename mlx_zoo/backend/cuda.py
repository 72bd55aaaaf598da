"""Kernels for CUDA: what MLX computes there in more passes over memory than it takes.

MLX compiles the texts below at run time, about a second each, and keeps the result for the process;
so what differs from call to call is an argument, and only what a loop's length hangs on is a
constant. On one H200 (benchmarks/cuda_ops.py) attention in TF32 takes half the time of MLX's
operations, depthwise convolution in float32 with its bias and activation 0.3 to 0.7, max pooling a
fifth. They have no gradient: MLX raises where one is asked for. `ops` says when these are used.

Letters in shape comments: B batch, H W C image, k side of a window; N queries, M keys, D dims of a
head.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

DTYPES = (mx.float32, mx.float16, mx.bfloat16)  # read and written; sums are float32
THREADS = 256  # of a block
SHARED_BYTES = 48 * 1024  # that a block has without asking for more
LANES = 64  # threads of a block, at most, that take channels of the same pixels

# What `act` may be: an expression of the float x. Names are those of models.layers.ACTIVATIONS.
ACTIVATIONS = {
    "linear": "x",
    "relu": "fmaxf(x, 0.0f)",
    "relu6": "fminf(fmaxf(x, 0.0f), 6.0f)",
    "silu": "x / (1.0f + expf(-x))",
    "gelu": "0.5f * x * (1.0f + erff(x * 0.70710678f))",
    "gelu_new": "0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)))",
}


def available() -> bool:
    """Is the default device an NVIDIA GPU?"""
    return mx.default_device() == mx.gpu and mx.cuda.is_available()


def in_tf32() -> bool:
    """Does MLX multiply float32 matrices in TF32? Unless the environment says MLX_ENABLE_TF32=0."""
    return os.environ.get("MLX_ENABLE_TF32", "1").strip() != "0"


# Convolution and pooling ------------------------------------------------------------------------

# A thread makes TALL x WIDE outputs of VEC channels. It holds one row of inputs at a time and adds
# it to the rows of outputs that see it. The weights of a block are in shared memory, by channels.
DEPTHWISE = """
    constexpr int COLUMNS = (WIDE - 1) * S + K;
    __shared__ __align__(16) float taps[K * K][LANES * VEC];

    const int H = x_shape[1], W = x_shape[2], C = x_shape[3];
    const int HO = (H + TOP + BOTTOM - K) / S + 1, WO = (W + LEFT + RIGHT - K) / S + 1;
    const int across = (WO + WIDE - 1) / WIDE, down = (HO + TALL - 1) / TALL;
    const int lanes = blockDim.x, rows = blockDim.y, first = blockIdx.y * lanes * VEC;
    for (int i = threadIdx.y * lanes + threadIdx.x; i < lanes * VEC * K * K; i += lanes * rows) {
        const int channel = i / (K * K);
        taps[i % (K * K)][channel] =
            first + channel < C ? static_cast<float>(w[(int64_t)first * K * K + i]) : 0.0f;
    }
    __syncthreads();

    const int lane = threadIdx.x * VEC, c = first + lane;
    int64_t tile = (int64_t)blockIdx.x * rows + threadIdx.y;
    if (c >= C || tile >= (int64_t)x_shape[0] * down * across) return;
    const int wo = tile % across * WIDE;
    tile /= across;
    const int ho = tile % down * TALL, b = tile / down;

    float sum[TALL][WIDE][VEC];
    #pragma unroll
    for (int v = 0; v < VEC; v++) {
        const float start = BIAS ? static_cast<float>(bias[c + v]) : 0.0f;
        #pragma unroll
        for (int i = 0; i < TALL * WIDE; i++) sum[i / WIDE][i % WIDE][v] = start;
    }

    #pragma unroll
    for (int r = 0; r < (TALL - 1) * S + K; r++) {
        const int h = ho * S - TOP + r;
        if (h < 0 || h >= H) continue;
        const T* row = x + ((int64_t)b * H + h) * W * C + c;
        AlignedVector<T, VEC> in[COLUMNS];
        #pragma unroll
        for (int q = 0; q < COLUMNS; q++) {
            const int column = wo * S - LEFT + q;
            if (column >= 0 && column < W) {
                in[q] = load_vector<VEC>(row + (int64_t)column * C, 0);
            } else {
                #pragma unroll
                for (int v = 0; v < VEC; v++) in[q][v] = static_cast<T>(0.0f);
            }
        }
        #pragma unroll
        for (int t = 0; t < TALL; t++) {
            const int i = r - t * S;
            if (i < 0 || i >= K) continue;
            #pragma unroll
            for (int j = 0; j < K; j++) {
                const auto tap = unsafe_load_vector<VEC>(&taps[i * K + j][lane], 0);
                #pragma unroll
                for (int q = 0; q < WIDE; q++) {
                    #pragma unroll
                    for (int v = 0; v < VEC; v++)
                        sum[t][q][v] += static_cast<float>(in[q * S + j][v]) * tap[v];
                }
            }
        }
    }

    #pragma unroll
    for (int t = 0; t < TALL; t++) {
        #pragma unroll
        for (int q = 0; q < WIDE; q++) {
            if (ho + t >= HO || wo + q >= WO) continue;
            AlignedVector<T, VEC> made;
            #pragma unroll
            for (int v = 0; v < VEC; v++) made[v] = static_cast<T>(activation(sum[t][q][v]));
            const int64_t pixel = ((int64_t)b * HO + ho + t) * WO + wo + q;
            unsafe_store_vector(y + pixel * C + c, 0, made);
        }
    }
"""

# A thread makes one output of VEC channels. Padding is no pixel; what is no number stays none.
MAX_POOL = """
    const int H = x_shape[1], W = x_shape[2], C = x_shape[3];
    const int HO = (H + 2 * PAD - K) / S + 1, WO = (W + 2 * PAD - K) / S + 1;
    const int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int lanes = C / VEC;
    if (n >= (int64_t)x_shape[0] * HO * WO * lanes) return;
    const int c = n % lanes * VEC;
    int64_t pixel = n / lanes;
    const int wo = pixel % WO;
    pixel /= WO;
    const int ho = pixel % HO, b = pixel / HO;

    float most[VEC];
    #pragma unroll
    for (int v = 0; v < VEC; v++) most[v] = __int_as_float(0xff800000);  // -infinity
    #pragma unroll
    for (int i = 0; i < K; i++) {
        const int h = ho * S - PAD + i;
        if (h < 0 || h >= H) continue;
        #pragma unroll
        for (int j = 0; j < K; j++) {
            const int column = wo * S - PAD + j;
            if (column < 0 || column >= W) continue;
            const auto in = load_vector<VEC>(x + (((int64_t)b * H + h) * W + column) * C + c, 0);
            #pragma unroll
            for (int v = 0; v < VEC; v++) {
                const float value = static_cast<float>(in[v]);
                most[v] = value > most[v] || value != value ? value : most[v];
            }
        }
    }
    AlignedVector<T, VEC> made;
    #pragma unroll
    for (int v = 0; v < VEC; v++) made[v] = static_cast<T>(most[v]);
    unsafe_store_vector(y + n * VEC, 0, made);
"""


def convolves(x: mx.array, weight: mx.array) -> bool:
    """Is `depthwise` faster than cuDNN, which does well in 16 bits? weight (C, k, k, 1)."""
    k = weight.shape[1]
    return x.dtype == weight.dtype == mx.float32 and k == weight.shape[2] and 3 <= k <= 7


def depthwise(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None = None,
    stride: int = 1,
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 0,
    act: str = "linear",
) -> mx.array:
    """Each channel's own k x k convolution, plus bias, through `act`: (B, H', W', C).

    Args:
        x: (B, H, W, C), of the same dtype as the others, one of DTYPES.
        weight: (C, k, k, 1), as mx.conv2d has it.
        bias: (C,).
        padding: on every side; or ((top, bottom), (left, right)).
        act: of ACTIVATIONS.
    """
    B, H, W, C = x.shape
    k = weight.shape[1]
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    (top, bottom), (left, right) = padding
    HO, WO = (H + top + bottom - k) // stride + 1, (W + left + right - k) // stride + 1
    tall, wide = _tile(k, stride, x.dtype)
    vec = _vector(C, x.dtype)
    lanes = most = min(LANES, SHARED_BYTES // (4 * k * k * vec))
    chunks = -(-C // (vec * most))
    lanes = -(-C // (vec * chunks))
    rows = THREADS // lanes
    tiles = B * -(-HO // tall) * -(-WO // wide)
    kernel = _kernel("depthwise", DEPTHWISE, ("x", "w", "bias"), act)
    return kernel(
        inputs=[x, weight, weight if bias is None else bias],
        template=[
            *(("T", x.dtype), ("K", k), ("S", stride), ("TALL", tall), ("WIDE", wide)),
            *(("TOP", top), ("BOTTOM", bottom), ("LEFT", left), ("RIGHT", right)),
            *(("VEC", vec), ("LANES", most), ("BIAS", bias is not None)),
        ],
        grid=(lanes * -(-tiles // rows), rows * chunks, 1),
        threadgroup=(lanes, rows, 1),
        output_shapes=[(B, HO, WO, C)],
        output_dtypes=[x.dtype],
    )[0]


def _tile(k: int, stride: int, dtype: mx.Dtype) -> tuple[int, int]:
    """Rows and columns of outputs that a thread makes: what was fastest of what registers hold."""
    if stride == 1 and dtype == mx.float32:
        return (4, 4) if k == 3 else (2, 7)
    return (2, 2) if k == 3 and stride == 2 else (2, 4)


def max_pool(x: mx.array, k: int, stride: int, padding: int = 0) -> mx.array:
    """The largest of each k x k window: (B, H, W, C) -> (B, H', W', C)."""
    B, H, W, C = x.shape
    HO, WO = ((side + 2 * padding - k) // stride + 1 for side in (H, W))
    vec = _vector(C, x.dtype)
    return _kernel("max_pool", MAX_POOL, ("x",))(
        inputs=[x],
        template=[("T", x.dtype), ("K", k), ("S", stride), ("PAD", padding), ("VEC", vec)],
        grid=(B * HO * WO * C // vec, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(B, HO, WO, C)],
        output_dtypes=[x.dtype],
    )[0]


# Activation -------------------------------------------------------------------------------------

# A thread makes VEC outputs.
ACTIVATE = """
    int64_t size = 1;
    for (int i = 0; i < x_ndim; i++) size *= x_shape[i];
    const int64_t n = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (n >= size) return;
    const int c = n % x_shape[x_ndim - 1];
    const auto in = load_vector<VEC>(x + n, 0);
    const auto other = load_vector<VEC>((ADDED ? added : x) + n, 0);
    AlignedVector<T, VEC> made;
    #pragma unroll
    for (int v = 0; v < VEC; v++) {
        float value = static_cast<float>(in[v]);
        if (BIAS) value += static_cast<float>(bias[c + v]);
        if (ADDED) value += static_cast<float>(other[v]);
        made[v] = static_cast<T>(activation(value));
    }
    unsafe_store_vector(y + n, 0, made);
"""


def activate(
    x: mx.array, act: str, bias: mx.array | None = None, added: mx.array | None = None
) -> mx.array:
    """act(x + bias + added) in one pass: x and `added` (..., C), bias (C,) -> (..., C)."""
    vec = _vector(x.shape[-1], x.dtype)
    return _kernel("activate", ACTIVATE, ("x", "bias", "added"), act)(
        inputs=[x, x if bias is None else bias, x if added is None else added],
        template=[
            *(("T", x.dtype), ("VEC", vec)),
            *(("BIAS", bias is not None), ("ADDED", added is not None)),
        ],
        grid=(x.size // vec, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )[0]


# Attention --------------------------------------------------------------------------------------

WARPS = 4  # of a block, each with QUERIES queries
QUERIES = 16

# The tensor cores' product of 16 x 8 and 8 x 8 numbers in TF32 (PTX ISA, mma.m16n8k8).
TENSOR_CORES = """
__device__ __forceinline__ unsigned tf32(float x) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}
__device__ __forceinline__ void multiply_add(
    float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
"""

# FlashAttention-2 (Dao 2023, arXiv:2307.08691): a warp keeps 16 queries, goes through the keys in
# steps, and scales what it has whenever a larger score turns up. Of a product, thread (g, t) of
# the 8 x 4 in a warp holds rows g and g + 8, columns 2t and 2t + 1; where it holds factors, its
# two numbers count as columns 2t and 2t + 1 too, which for a sum is as good as their own order.
# The strides in shared memory let the 32 threads read from 32 banks.
ATTENTION = """
    constexpr int KEYS = D > 64 ? 32 : 64;
    constexpr int K_STRIDE = D + (40 - D % 32) % 32, V_STRIDE = D + (36 - D % 32) % 32;
    constexpr float LOG2E = 1.44269504f;
    const float NONE = __int_as_float(0xff800000);  // -infinity
    __shared__ __align__(16) unsigned keys[KEYS][K_STRIDE], values[KEYS][V_STRIDE];

    const int heads = q_shape[1], N = q_shape[2], M = k_shape[2];
    const int b = blockIdx.x / heads, h = blockIdx.x % heads;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int top = (blockIdx.y * WARPS + threadIdx.x / 32) * 16;
    const int rows[2] = {top + g, top + g + 8};
    const float* qs = q + b * q_strides[0] + h * q_strides[1];
    const float* ks = k + b * k_strides[0] + h * k_strides[1];
    const float* vs = v + b * v_strides[0] + h * v_strides[1];

    unsigned query[D / 8][4];
    #pragma unroll
    for (int i = 0; i < D / 8; i++) {
        #pragma unroll
        for (int n = 0; n < 4; n++) {  // rows alternate
            const int64_t row = min(rows[n % 2], N - 1), column = i * 8 + 2 * t + n / 2;
            const float number = qs[row * q_strides[2] + column * q_strides[3]];
            query[i][n] = tf32(number * scale[0] * LOG2E);
        }
    }

    float sum[D / 8][4] = {}, most[2] = {NONE, NONE}, total[2] = {};
    const int end = CAUSAL ? min(M, (int)(blockIdx.y + 1) * WARPS * 16 + M - N) : M;
    for (int start = 0; start < end; start += KEYS) {
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS * D / 4; i += WARPS * 32) {
            const int key = i / (D / 4), column = i % (D / 4) * 4;
            float in[2][4] = {};
            if (start + key < M) {
                const float* from_k = ks + (start + key) * k_strides[2];
                const float* from_v = vs + (start + key) * v_strides[2];
                load4(from_k + column * k_strides[3], k_strides[3], in[0]);
                load4(from_v + column * v_strides[3], v_strides[3], in[1]);
            }
            #pragma unroll
            for (int n = 0; n < 4; n++) {
                keys[key][column + n] = tf32(in[0][n]);
                values[key][column + n] = tf32(in[1][n]);
            }
        }
        __syncthreads();

        float score[KEYS / 8][4] = {};
        #pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
            #pragma unroll
            for (int i = 0; i < D / 8; i++) {
                const uint2 key = *reinterpret_cast<const uint2*>(&keys[j * 8 + g][i * 8 + 2 * t]);
                multiply_add(score[j], query[i], key.x, key.y);
            }
        }

        float larger[2] = {most[0], most[1]};
        #pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
            #pragma unroll
            for (int n = 0; n < 4; n++) {
                const int key = start + j * 8 + 2 * t + n % 2, row = rows[n / 2];
                if (key >= M || (CAUSAL && key > row + M - N)) {
                    score[j][n] = NONE;
                } else if (MASK) {
                    const float added =
                        mask[b * mask_strides[0] + h * mask_strides[1]
                             + min(row, N - 1) * mask_strides[2] + key * mask_strides[3]];
                    score[j][n] += fmaxf(added * LOG2E, -3e38f);  // what is hidden stays a number
                }
                larger[n / 2] = fmaxf(larger[n / 2], score[j][n]);
            }
        }
        #pragma unroll
        for (int r = 0; r < 2; r++) {
            larger[r] = fmaxf(larger[r], __shfl_xor_sync(0xffffffff, larger[r], 1));
            larger[r] = fmaxf(larger[r], __shfl_xor_sync(0xffffffff, larger[r], 2));
            const float shrink = exp2f(most[r] - larger[r]);
            most[r] = larger[r];
            total[r] *= shrink;
            #pragma unroll
            for (int i = 0; i < D / 8; i++) {
                sum[i][2 * r] *= shrink;
                sum[i][2 * r + 1] *= shrink;
            }
        }

        #pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
            #pragma unroll
            for (int n = 0; n < 4; n++) {
                score[j][n] = exp2f(score[j][n] - most[n / 2]);
                total[n / 2] += score[j][n];
            }
            const unsigned weight[4] = {
                tf32(score[j][0]), tf32(score[j][2]), tf32(score[j][1]), tf32(score[j][3])};
            #pragma unroll
            for (int i = 0; i < D / 8; i++)
                multiply_add(sum[i], weight,
                    values[j * 8 + 2 * t][i * 8 + g], values[j * 8 + 2 * t + 1][i * 8 + g]);
        }
    }

    #pragma unroll
    for (int r = 0; r < 2; r++) {
        total[r] += __shfl_xor_sync(0xffffffff, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffff, total[r], 2);
        if (rows[r] >= N) continue;
        float* out = y + (((int64_t)b * N + rows[r]) * heads + h) * D + 2 * t;
        #pragma unroll
        for (int i = 0; i < D / 8; i++) {
            out[i * 8] = sum[i][2 * r] / total[r];
            out[i * 8 + 1] = sum[i][2 * r + 1] / total[r];
        }
    }
"""

# Four numbers that lie `stride` apart.
LOAD4 = """
__device__ __forceinline__ void load4(const float* from, long long stride, float (&into)[4]) {
    if (stride == 1 && reinterpret_cast<unsigned long long>(from) % 16 == 0) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        into[0] = four.x, into[1] = four.y, into[2] = four.z, into[3] = four.w;
    } else {
        for (int i = 0; i < 4; i++) into[i] = from[i * stride];
    }
}
"""


def attends(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None = None) -> bool:
    """Can `attention` take these: float32, several queries, heads alike, no boolean mask?"""
    D = q.shape[-1]
    arrays = [q, k, v] if mask is None or isinstance(mask, str) else [q, k, v, mask]
    return (
        in_tf32()
        and all(x.dtype == mx.float32 for x in arrays)
        and D % 8 == 0
        and D <= 128
        and 1 < q.shape[2] <= k.shape[2]
        and q.shape[1] == k.shape[1]
        and k.shape == v.shape
    )


def attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | str | None = None
) -> mx.array:
    """softmax(scale q k^T + mask) v with TF32's products, for arrays that `attends` takes.

    Args:
        q: (B, heads, N, D), in any order of memory.
        k, v: (B, heads, M, D), likewise.
        mask: added; broadcasts to (B, heads, N, M). Or "causal": the last N of M see those before.

    Returns:
        (B, heads, N, D); in memory the heads follow the tokens.
    """
    B, heads, N, D = q.shape
    M = k.shape[2]
    masked = isinstance(mask, mx.array)
    added = mx.broadcast_to(mask, (B, heads, N, M)) if isinstance(mask, mx.array) else q
    y = _kernel("attention", ATTENTION, ("q", "k", "v", "mask", "scale"), is_strided=True)(
        inputs=[q, k, v, added, _number(scale)],
        template=[("D", D), ("WARPS", WARPS), ("CAUSAL", isinstance(mask, str)), ("MASK", masked)],
        grid=(B * heads * WARPS * 32, -(-N // (WARPS * QUERIES)), 1),
        threadgroup=(WARPS * 32, 1, 1),
        output_shapes=[(B, N, heads, D)],
        output_dtypes=[mx.float32],
    )[0]
    return y.swapaxes(1, 2)


# ------------------------------------------------------------------------------------------------


@cache
def _kernel(
    name: str,
    text: str,
    inputs: tuple[str, ...],
    act: str = "linear",
    is_strided: bool = False,  # whether it takes arrays whose memory is in another order
) -> Callable[..., list[mx.array]]:
    """The function whose body is `text`, with `activation(x)` as `act` says; its output is y."""
    activation = f"float activation(float x) {{ return {ACTIVATIONS[act]}; }}\n"
    kernel: Any = mx.fast.cuda_kernel(
        name=f"mlx_zoo_{name}_{act}",
        input_names=list(inputs),
        output_names=["y"],
        source=text,
        header=f"__device__ __forceinline__ {activation}{TENSOR_CORES}{LOAD4}",
        ensure_row_contiguous=not is_strided,
    )
    return kernel


@cache
def _number(value: float) -> mx.array:
    """A kernel's argument. As an array, for each constant would be a kernel of its own."""
    number = mx.array([value], mx.float32)
    mx.eval(number)
    return number


def _vector(C: int, dtype: mx.Dtype) -> int:
    """How many channels a thread takes at once: at most 16 bytes, which divide all C."""
    return math.gcd(C, 16 // dtype.size)
