"""Attention on CuPy arrays, by the kernels of the sm80 family (mma.sync and cp.async: every NVIDIA GPU from compute capability 8.0 on)."""

import logging
import os
import time

import cupy

from cuflash.cupy_backend import launch, modules, tiles
from cuflash.problem import allocate_like_order

log = logging.getLogger("cuflash")

MIN_COMPUTE_CAPABILITY = 80
_MAX_PLANS = 1024
_plans = {}


def forward(problem, q, k, v, out=None):
    """out and lse; see cuflash.attention_forward."""
    with cupy.cuda.Device(problem.device):
        _check(problem)
        target = allocate_like_order(cupy, q, problem.out_shape, problem.dtype) if out is None else out
        q, k, v = _ready("q", q), _ready("k", k), _ready("v", v)
        if target.shape[-1] > 1 and target.strides[-1] != target.dtype.itemsize:
            log.info("out: columns do not lie side by side; it is computed in a new array and copied")
            target = cupy.empty(problem.out_shape, problem.dtype)
        lse = cupy.empty(problem.lse_shape, cupy.float32)
        if lse.size:
            offset, offsets = _offset(problem)
            key = ("forward", *_key(problem, q, k, v, target), offset)
            plan = _plans.get(key)
            if plan is None:
                plan = _remember(key, launch.plan_forward(problem, *map(launch.layout, (q, k, v, target)), launch.layout(lse, 1), offset))
            plan({"q": q.data.ptr, "k": k.data.ptr, "v": v.data.ptr, "out": target.data.ptr, "lse": lse.data.ptr, "offsets": offsets})
        if out is not None and target is not out:
            out[...] = target
            target = out
        return target, lse


def backward(problem, dout, q, k, v, out, lse, dlse=None):
    """dq, dk and dv; see cuflash.attention_backward."""
    with cupy.cuda.Device(problem.device):
        _check(problem)
        dq, dk, dv = (allocate_like_order(cupy, array, array.shape, problem.dtype) for array in (q, k, v))
        if not lse.size or not problem.key_length:
            for gradient in (dq, dk, dv):
                gradient.fill(0)
            return dq, dk, dv
        q, k, v, dout = _ready("q", q), _ready("k", k), _ready("v", v), _ready("dout", dout)
        if out.shape[-1] > 1 and out.strides[-1] != out.dtype.itemsize:
            out = _ready("out", out)
        offset, offsets = _offset(problem)
        gradient_of_lse = lse if dlse is None else dlse
        key = ("backward", *_key(problem, dout, q, k, v, out, lse, gradient_of_lse, dq, dk, dv), offset, problem.deterministic)
        plan = _plans.get(key)
        if plan is None:
            views = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "dq": dq, "dk": dk, "dv": dv}
            views = {name: launch.layout(array) for name, array in views.items()}
            views.update(lse=launch.layout(lse, 1), dlse=launch.layout(gradient_of_lse, 1))
            plan = _remember(key, launch.BackwardPlan(problem, views, offset))

        row_lse, row_d = cupy.empty((2, plan.rows), cupy.float32)
        pointers = {"q": q.data.ptr, "k": k.data.ptr, "v": v.data.ptr, "out": out.data.ptr, "dout": dout.data.ptr, "lse": lse.data.ptr}
        pointers |= {"dlse": 0 if dlse is None else dlse.data.ptr, "row_lse": row_lse.data.ptr, "row_d": row_d.data.ptr, "offsets": offsets}
        key_gradients = (cupy.empty(plan.dk_shape, cupy.float32), cupy.empty(plan.dv_shape, cupy.float32)) if plan.key_parts else (dk, dv)
        pointers |= {"dk": key_gradients[0].data.ptr, "dv": key_gradients[1].data.ptr}
        if plan.separate_dq:
            query_sum = cupy.empty(plan.dq_shape, cupy.float32) if plan.query_parts else dq
            pointers["dq"] = query_sum.data.ptr
        else:
            query_sum = cupy.empty(plan.dq_sum_shape, cupy.float32)
            pointers |= {"dq": dq.data.ptr, "dq_sum": query_sum.data.ptr}
        plan.prepare(pointers)
        plan.main(pointers)
        if plan.query is not None:
            plan.query(pointers)
        if plan.finish is not None:
            plan.finish(pointers)
        if plan.query_parts:
            _sum_parts(query_sum[..., : problem.query_length, : problem.head_dim], dq, 1.0 if plan.separate_dq else problem.scale)
        if plan.key_parts:
            _sum_parts(key_gradients[0][..., : problem.head_dim], dk, 1.0)
            _sum_parts(key_gradients[1][..., : problem.value_dim], dv, 1.0)
        return dq, dk, dv


def _sum_parts(parts, gradient, scale):
    """gradient = scale * parts, summed over what gradient's array was broadcast along and over the heads that share one of its heads."""
    lead = gradient.shape[:-2]
    missing = parts.ndim - gradient.ndim
    axes = list(range(missing)) + [missing + axis for axis, size in enumerate(lead[:-1]) if size == 1 and parts.shape[missing + axis] > 1]
    if lead:
        heads = parts.ndim - 3
        parts = parts.reshape(*parts.shape[:heads], lead[-1], -1, *parts.shape[-2:])
        axes.append(heads + 1)
    total = parts.sum(axis=tuple(axes)).reshape(gradient.shape)
    cupy.multiply(total, cupy.float32(scale), out=total)
    gradient[...] = total.astype(gradient.dtype, copy=False)


def _check(problem):
    capability = int(cupy.cuda.Device().compute_capability)
    if capability < MIN_COMPUTE_CAPABILITY:
        raise RuntimeError(f"GPU {problem.device} has compute capability {capability / 10}; cuflash needs {MIN_COMPUTE_CAPABILITY / 10} or newer")
    if max(problem.query_length, problem.key_length) >= launch.MAX_LENGTH:
        raise ValueError(f"lengths are {problem.query_length} and {problem.key_length}; allowed on a GPU: below {launch.MAX_LENGTH}")


def _ready(name, array):
    """The array as the kernels read it: columns side by side, every row at a multiple of 16 bytes. In place where that holds, else a logged copy."""
    size = array.dtype.itemsize
    side_by_side = array.shape[-1] == 1 or array.strides[-1] == size
    if side_by_side and array.data.ptr % 16 == 0 and all(stride % 16 == 0 or length <= 1 for stride, length in zip(array.strides[:-1], array.shape[:-1])):
        return array
    log.info("%s: strides %s of shape %s are not 16-byte rows; copied", name, array.strides, array.shape)
    kept = tuple(slice(None) if stride else slice(0, 1) for stride in array.strides[:-1])   # a broadcast axis is not copied out
    source = array[kept]
    columns = -(-array.shape[-1] * size // 16) * 16 // size
    copy = cupy.zeros((*source.shape[:-1], columns), array.dtype)[..., : array.shape[-1]]
    copy[...] = source
    return cupy.broadcast_to(copy, array.shape)


def _offset(problem):
    """Strides of an array of offsets over its batch dimensions, or None, and its address."""
    if isinstance(problem.offset, int):
        return None, 0
    return tuple(stride // 8 if length > 1 else 0 for stride, length in zip(problem.offset.strides, problem.offset.shape)), problem.offset.data.ptr


def _key(problem, *arrays):
    """What a plan depends on."""
    offset = problem.offset if isinstance(problem.offset, int) else None
    return (problem.device, problem.precision, problem.scale, problem.causal, offset, *[(array.shape, array.strides) for array in arrays])


def _remember(key, plan):
    if len(_plans) >= _MAX_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def describe():
    """For `python -m cuflash info`: which kernels run here, and why."""
    cache = os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))
    described = {"nvrtc": modules.nvrtc_version(), "cache_folder": cache, "kernels_folder": str(modules.kernels_folder())}
    if not cupy.cuda.is_available():
        return described | {"family": None, "why": "no GPU is available"}
    capability = int(cupy.cuda.Device().compute_capability)
    described["compute_capability"] = f"{capability / 10}"
    if capability < MIN_COMPUTE_CAPABILITY:
        return described | {"family": None, "why": f"compute capability {capability / 10} is below {MIN_COMPUTE_CAPABILITY / 10}"}
    return described | {"family": "sm80", "why": "mma.sync and cp.async kernels, for every GPU of compute capability 8.0 and newer"}


def warmup(dtypes, head_dims):
    """Compile forward and backward for these dtypes (names; 'tf32' too) and head dims; yields (kernel, seconds)."""
    device = cupy.cuda.Device().id
    limit = launch.shared_limit(device)
    for precision in dtypes:
        size, kind = tiles.element_bytes(precision), tiles.PRECISIONS[precision]
        for head_dim in head_dims:
            dims = tiles.head_dims(head_dim, head_dim)
            tables = (tiles.FORWARD, tiles.BACKWARD, tiles.BACKWARD_WITHOUT_DQ, tiles.BACKWARD_QUERY)
            forward_tile, main, without_dq, query = (tiles.choose(table, precision, dims, limit) for table in tables)
            wanted = [(forward_tile.file, forward_tile.name(precision, dims, 0), forward_tile.shared_bytes(dims, size))]
            if main.query_gradient:
                wanted += [(main.file, main.name(precision, dims, 0, True), main.shared_bytes(dims, size))]
            wanted += [(without_dq.file, without_dq.name(precision, dims, 0, False), without_dq.shared_bytes(dims, size))]
            wanted += [(query.file, query.name(precision, dims, 0), query.shared_bytes(dims, size))]
            wanted += [("backward_rows.cu", f"backward_prepare<{kind}, {dims[0]}, {flag}>", 0) for flag in ("true", "false")]
            wanted += [("backward_rows.cu", f"backward_finish<{kind}, {dims[0]}>", 0)]
            for file, name, shared_bytes in wanted:
                started = time.perf_counter()
                modules.kernel(file, name, shared_bytes, device)
                yield name, time.perf_counter() - started
