"""`mx.fast.cuda_kernel` without a GPU: the text as C++, and the threads of a block as threads.

Float32 alone. The tensor cores, and what the threads of a warp tell each other, are played by
memory and barriers; TF32 is rounded as the hardware rounds it.
"""

from __future__ import annotations

import ctypes
import hashlib
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np

PRELUDE = r"""
#include <algorithm>
#include <array>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __device__
#define __forceinline__ inline
#define __global__
using std::max;
using std::min;
struct Dim { int x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
thread_local Dim threadIdx, blockIdx;
Dim blockDim;
std::barrier<>* block;
struct Warp { std::barrier<> all{32}; unsigned a[32][4], b[32][2]; float value[32]; };
std::vector<Warp>* warps;
inline int lane() { return (threadIdx.y * blockDim.x + threadIdx.x) % 32; }
inline Warp& warp() { return (*warps)[(threadIdx.y * blockDim.x + threadIdx.x) / 32]; }
inline void __syncthreads() { block->arrive_and_wait(); }
inline float __int_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float __shfl_xor_sync(unsigned, float x, int other) {
    Warp& w = warp();
    w.value[lane()] = x;
    w.all.arrive_and_wait();
    x = w.value[lane() ^ other];
    w.all.arrive_and_wait();
    return x;
}
template <typename T, int N> struct alignas(sizeof(T) * N) AlignedVector {
    T val[N];
    T& operator[](int i) { return val[i]; }
    T operator[](int i) const { return val[i]; }
};
template <int N, typename T> AlignedVector<T, N> unsafe_load_vector(const T* from, uint32_t n) {
    return reinterpret_cast<const AlignedVector<T, N>*>(from)[n];
}
template <int N, typename T> AlignedVector<T, N> load_vector(const T* from, uint32_t n) {
    AlignedVector<T, N> v;
    memcpy(&v, from + n * N, sizeof(v));
    return v;
}
template <int N, typename T>
void unsafe_store_vector(T* to, uint32_t n, const AlignedVector<T, N>& v) {
    reinterpret_cast<AlignedVector<T, N>*>(to)[n] = v;
}
"""

TENSOR_CORES = r"""
inline unsigned tf32(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x1000) & ~0x1fffu;
}
inline void multiply_add(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    Warp& w = warp();
    memcpy(w.a[lane()], a, 16);
    w.b[lane()][0] = b0, w.b[lane()][1] = b1;
    w.all.arrive_and_wait();
    for (int n = 0; n < 4; n++) {
        const int row = lane() / 4 + n / 2 * 8, column = lane() % 4 * 2 + n % 2;
        for (int k = 0; k < 8; k++)
            sum[n] += __int_as_float(w.a[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2])
                    * __int_as_float(w.b[column * 4 + k % 4][k / 4]);
    }
    w.all.arrive_and_wait();
}
"""

LAUNCH = r"""
extern "C" void launch(int gx, int gy, int bx, int by, void** a, int** shapes, int64_t** strides) {
    blockDim = {bx, by};
    for (int y = 0; y < gy; y++) for (int x = 0; x < gx; x++) {
        std::barrier<> everyone(bx * by);
        std::vector<Warp> all((bx * by + 31) / 32);
        block = &everyone, warps = &all;
        std::vector<std::thread> threads;
        for (int i = 0; i < bx * by; i++) threads.emplace_back([=] {
            threadIdx = {i % bx, i / bx}, blockIdx = {x, y};
            KERNEL;
            block->arrive_and_drop();
        });
        for (auto& thread : threads) thread.join();
    }
}
"""


class Compiler:
    """Stands for `mx.fast.cuda_kernel`; what it compiles is kept in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, name, input_names, output_names, source, header, ensure_row_contiguous=True):
        before, _, after = header.partition("__device__ __forceinline__ unsigned tf32")
        header = (
            before + TENSOR_CORES + after[after.index("__device__ __forceinline__ void load4") :]
        )
        assert output_names == ["y"]

        def kernel(inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            mx.eval(inputs)
            views = [np.asarray(x) for x in inputs]
            if ensure_row_contiguous:
                views = [np.ascontiguousarray(x) for x in views]
            (shape,) = output_shapes
            y = np.full(shape, np.nan, np.float32)  # what a kernel leaves out is seen
            ranks = [x.ndim for x in views]
            run = self.compiled(input_names, ranks, source, header, template)
            shapes = [(ctypes.c_int * 10)(*x.shape) for x in views]
            strides = [(ctypes.c_int64 * 10)(*(n // 4 for n in x.strides)) for x in views]
            assert grid[2] == threadgroup[2] == 1
            blocks = [-(-n // size) for n, size in zip(grid, threadgroup, strict=True)]
            addresses = [x.ctypes.data for x in (*views, y)]
            run(
                *blocks[:2],
                *threadgroup[:2],
                (ctypes.c_void_p * len(addresses))(*addresses),
                (ctypes.c_void_p * len(shapes))(*map(ctypes.addressof, shapes)),
                (ctypes.c_void_p * len(strides))(*map(ctypes.addressof, strides)),
            )
            return [mx.array(y)]

        return kernel

    def compiled(self, names, ranks, source, header, template):
        constants, parameters, given = ["using T = float;"], [], []
        for name, value in template:
            if name != "T":
                constants.append(f"constexpr int {name} = {int(value)};")
        for i, (name, rank) in enumerate(zip(names, ranks, strict=True)):
            parameters += [f"const float* {name}", f"const int* {name}_shape"]
            parameters += [f"const int64_t* {name}_strides", f"int {name}_ndim"]
            given += [f"(const float*)a[{i}]", f"shapes[{i}]", f"strides[{i}]", str(rank)]
        body = "\n".join([*constants, source])
        kernel = f"void kernel({', '.join(parameters)}, float* y) {{\n{body}\n}}\n"
        call = f"kernel({', '.join(given)}, (float*)a[{len(names)}])"
        text = PRELUDE + header + kernel + LAUNCH.replace("KERNEL", call)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        if not path.exists():
            path.with_suffix(".cpp").write_text(text)
            flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
            subprocess.run(["g++", *flags, path.with_suffix(".cpp"), "-o", path], check=True)
        return ctypes.CDLL(str(path)).launch
