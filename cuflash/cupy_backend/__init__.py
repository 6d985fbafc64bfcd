"""Attention on CuPy arrays, by the newest kernel family that has a kernel for a call: sm80, every NVIDIA GPU from compute capability 8.0 on, or sm90."""

import dataclasses
import logging
import math
import os
import time

import cupy

from cuflash.cupy_backend import launch, modules, tiles
from cuflash.problem import allocate_like_order, side_by_side

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
        if not side_by_side(target):
            log.info("out: columns do not lie side by side; it is computed in a new array and copied")
            target = cupy.empty(problem.out_shape, problem.dtype)
        lse = _empty_lse(problem.lse_shape, problem.lse_dtype)
        if lse.size:
            call = _Call(problem, {"q": q, "k": k, "v": v, "out": target, "lse": lse})
            _launch_forward(call.plan("forward", launch.plan_forward), call.words, lse)
        if out is not None and target is not out:
            out[...] = target
            target = out
        return target, lse


def _empty_lse(shape, dtype):
    """An array for lse, and behind it in memory a word for the kernel to count with."""
    return cupy.ndarray(shape, dtype, cupy.cuda.alloc(dtype.itemsize * (math.prod(shape) + 1)))


def _launch_forward(plan, words, lse):
    if plan.counts:
        words["tile_counter"] = lse.data.ptr + lse.nbytes
        if not isinstance(plan, launch.PackedForward):  # which clears it itself
            cupy.cuda.runtime.memsetAsync(words["tile_counter"], 0, 4, cupy.cuda.get_current_stream().ptr)
    plan(words)


class _Forward:
    """A forward that was made before, for other arrays of the same kind; None where these need more than that (see forward)."""

    def __init__(self, problem, plan):
        self.device, self.plan = problem.device, plan
        self.out_shape, self.dtype, self.lse_shape, self.lse_dtype = problem.out_shape, problem.dtype, problem.lse_shape, problem.lse_dtype

    def __call__(self, q, k, v, cu_seqlens):
        if (q.data.ptr | k.data.ptr | v.data.ptr) & 15 or cupy.cuda.runtime.getDevice() != self.device:
            return None
        out = cupy.ndarray(self.out_shape, self.dtype)
        lse = _empty_lse(self.lse_shape, self.lse_dtype)
        words = {"q": q.data.ptr, "k": k.data.ptr, "v": v.data.ptr, "out": out.data.ptr, "lse": lse.data.ptr}
        if cu_seqlens is not None:
            words |= {"cu_q": cu_seqlens[0].data.ptr, "cu_k": cu_seqlens[1].data.ptr}
        _launch_forward(self.plan, words, lse)
        return out, lse


def _only_addresses_change(problem, *arrays):
    """Whether the same call for other arrays differs in nothing else: no copies, no seeds, no arrays among its options but offsets of packed sequences."""
    if problem.dropout or not (problem.offset is None or isinstance(problem.offset, int)):
        return False
    if any(array is not None for array in (problem.mask, problem.bias, problem.alibi_slopes, problem.sinks, problem.q_lengths, problem.kv_lengths)):
        return False
    return all(map(_in_place, arrays))


def forward_again(problem, q, k, v, out, lse):
    """After a forward without `out`: what makes the same call for other arrays at less cost for the host, or None where there is more to do than a launch."""
    if not (lse.size and out.flags.c_contiguous and _only_addresses_change(problem, q, k, v)):
        return None
    arrays = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    with cupy.cuda.Device(problem.device):
        return _Forward(problem, _Call(problem, arrays).plan("forward", launch.plan_forward))


class _Backward:
    """The same of a backward."""

    def __init__(self, problem, plan):
        self.problem, self.plan = dataclasses.replace(problem, cu_q=None, cu_k=None), plan

    def __call__(self, dout, q, k, v, out, lse, dlse, cu_seqlens):
        problem = self.problem
        if (dout.data.ptr | q.data.ptr | k.data.ptr | v.data.ptr) & 15 or cupy.cuda.runtime.getDevice() != problem.device:
            return None
        dq, dk, dv = (allocate_like_order(cupy, array, array.shape, problem.dtype) for array in (q, k, v))
        words = {"q": q.data.ptr, "k": k.data.ptr, "v": v.data.ptr, "out": out.data.ptr, "dout": dout.data.ptr, "lse": lse.data.ptr}
        words |= {"dq": dq.data.ptr, "dk": dk.data.ptr, "dv": dv.data.ptr}
        if dlse is not None:
            words["dlse"] = dlse.data.ptr
        if cu_seqlens is not None:
            words |= {"cu_q": cu_seqlens[0].data.ptr, "cu_k": cu_seqlens[1].data.ptr}
        _run_backward(problem, self.plan, words, dq, dk, dv, None, None)
        return dq, dk, dv


def backward_again(problem, dout, q, k, v, out, lse, dlse, *gradients):
    """The same of a backward."""
    if not (lse.size and problem.key_length and side_by_side(out) and _only_addresses_change(problem, dout, q, k, v)):
        return None
    arrays = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients))}
    if dlse is not None:
        arrays["dlse"] = dlse
    with cupy.cuda.Device(problem.device):
        return _Backward(problem, _Call(problem, arrays).plan("backward", launch.BackwardPlan))


def backward(problem, dout, q, k, v, out, lse, dlse=None):
    """dq, dk, dv and, where they are given, dbias and dsinks; see cuflash.attention_backward."""
    with cupy.cuda.Device(problem.device):
        _check(problem)
        dq, dk, dv = (allocate_like_order(cupy, array, array.shape, problem.dtype) for array in (q, k, v))
        nothing = not lse.size or not problem.key_length
        if nothing:
            for gradient in (dq, dk, dv):
                gradient.fill(0)
        dbias = None if problem.bias is None else (cupy.zeros if nothing or problem.sequences else cupy.empty)(problem.bias.shape, problem.bias.dtype)
        dsinks = None if problem.sinks is None else cupy.zeros(problem.sinks.shape, problem.sinks.dtype)
        if not nothing or (lse.size and dsinks is not None):
            q, k, v, dout = _ready("q", q), _ready("k", k), _ready("v", v), _ready("dout", dout)
            if not side_by_side(out):
                out = _ready("out", out)
            arrays = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
            if dlse is not None:
                arrays["dlse"] = dlse
            call = _Call(problem, arrays)
            _run_backward(problem, call.plan("backward", launch.BackwardPlan), call.words, dq, dk, dv, dbias, dsinks)
        given = (dbias.reshape(problem.bias_shape),) if dbias is not None else ()
        return (dq, dk, dv, *given) if dsinks is None else (dq, dk, dv, *given, dsinks)


def _run_backward(problem, plan, words, dq, dk, dv, dbias, dsinks):
    """The launches of a backward, with their buffers."""
    sums = problem.lse_dtype
    if plan.outside is not None:
        plan.outside(words)
    names = ["row_lse", "row_d", *["row_sink"] * (dsinks is not None), *["row_turn"] * plan.counts]
    rows = cupy.empty((len(names), plan.rows), sums)
    words |= {name: rows.data.ptr + index * plan.rows * sums.itemsize for index, name in enumerate(names)}
    if plan.pieces_shape is not None:
        pieces = cupy.zeros(plan.pieces_shape, sums)
        words["partial_out"] = pieces.data.ptr
    if plan.walks_together:
        walked_to = cupy.empty(1, cupy.uint32)
        words["walked_to"] = walked_to.data.ptr
    query_sum, query_parts, key_parts = None, dq, (dk, dv)
    if plan.dq_sum_shape is not None:
        query_sum = cupy.empty(plan.dq_sum_shape, sums)
        words["dq_sum"] = query_sum.data.ptr - plan.rows_in_dq * plan.dq_sum_shape[-1] * sums.itemsize  # rows count from those in dq
    parts = cupy.zeros if problem.sequences else cupy.empty
    if plan.query_parts and (plan.separate_dq or plan.finishes):
        query_parts = parts(plan.dq_shape, sums)
        words["dq"] = query_parts.data.ptr
    if plan.key_parts:
        key_parts = parts(plan.dk_shape, sums), parts(plan.dv_shape, sums)
        words |= {"dk": key_parts[0].data.ptr, "dv": key_parts[1].data.ptr}
    bias_sum = dbias
    if plan.bias_sum is not None:
        if plan.bias_sum == (dbias.shape, dbias.dtype):
            dbias.fill(0)
        else:
            bias_sum = cupy.zeros(*plan.bias_sum)
        words["dbias"] = bias_sum.data.ptr
    for step in (plan.prepare, plan.main, plan.query, plan.finish):
        if step is not None:
            step(words)
    if dsinks is not None:
        dsinks[...] = -rows[2].reshape(-1, problem.heads, plan.rows // math.prod(problem.lead)).sum(axis=(0, 2), dtype=cupy.float64)
    if plan.main is None:
        return
    if plan.query_parts:
        if query_parts is dq:
            _sum_parts(query_sum[..., : problem.query_length, : problem.head_dim], dq, problem.scale)
        else:
            _sum_parts(query_parts[..., : problem.head_dim], dq, 1.0)
    if plan.key_parts:
        _sum_parts(key_parts[0][..., : problem.head_dim], dk, 1.0)
        _sum_parts(key_parts[1][..., : problem.value_dim], dv, 1.0)
    if bias_sum is not dbias:
        dbias[...] = bias_sum[..., : dbias.shape[-2], : dbias.shape[-1]]
    if plan.bias is not None:
        bias_parts = parts(plan.bias_shape, sums) if plan.bias_parts else dbias
        plan.bias(words | {"dbias": bias_parts.data.ptr})
        if plan.bias_parts:
            dbias[...] = bias_parts.sum(axis=0)


class _Call:
    """The arrays of one call as the kernels take them: `words` for a launch, and what its plan depends on."""

    def __init__(self, problem, arrays):
        self.problem, self.arrays = problem, arrays
        self.words = {name: array.data.ptr for name, array in arrays.items()}
        over_batch = {"q_lengths": problem.q_lengths, "kv_lengths": problem.kv_lengths, "offsets": None if isinstance(problem.offset, int) else problem.offset}
        self.over_batch = {name: array.astype(cupy.int64, copy=False) for name, array in over_batch.items() if array is not None}
        self.over_heads = {name: array for name, array in (("alibi_slopes", problem.alibi_slopes), ("sinks", problem.sinks)) if array is not None}
        self.over_heads = {name: array.astype(problem.lse_dtype, copy=False) for name, array in self.over_heads.items()}
        self.over_scores = {name: array for name, array in (("mask", problem.mask), ("bias", problem.bias)) if array is not None}
        for group in (self.over_batch, self.over_heads, self.over_scores):
            self.words |= {name: array.data.ptr for name, array in group.items()}
        pieces = () if problem.bias is None else (("bias pairs", 2 * problem.bias.dtype.itemsize), ("bias chunks", 16))
        self.alignment = tuple(name for name, step in pieces if launch.aligned(problem.bias, problem, step))
        if problem.sequences:
            self.sequences = cupy.ascontiguousarray(problem.cu_q), cupy.ascontiguousarray(problem.cu_k)
            self.words |= {"cu_q": self.sequences[0].data.ptr, "cu_k": self.sequences[1].data.ptr}
        if problem.dropout:
            self.words["seed"] = problem.seed

    def plan(self, direction, make):
        """The plan of this call: made once for all calls that agree in everything but addresses, and the seed."""
        problem = self.problem
        key = (direction, problem.device, problem.precision, problem.scale, problem.left, problem.right, problem.deterministic)
        bias_dtype = None if problem.bias is None else problem.bias.dtype
        offset = problem.offset if isinstance(problem.offset, int) else None
        key += (offset, problem.softcap, problem.keep, problem.sequences, self.alignment, bias_dtype)
        for group in (self.arrays, self.over_batch, self.over_heads, self.over_scores):
            key += tuple((name, array.shape, array.strides) for name, array in group.items())
        plan = _plans.get(key)
        if plan is None:
            views = {name: launch.layout(array, 1 if name in ("lse", "dlse") else 2) for name, array in self.arrays.items()}
            views |= {name: launch.layout(array, 2) for name, array in self.over_scores.items()}
            views |= {name: launch.layout(array, 0) for name, array in self.over_heads.items()}
            views |= {name: launch.layout_over_batch(array) for name, array in self.over_batch.items()}
            plan = make(problem, views, self.alignment)
            if len(_plans) >= _MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
        return plan


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
    if scale != 1.0:
        cupy.multiply(total, total.dtype.type(scale), out=total)
    gradient[...] = total


def _check(problem):
    capability = int(cupy.cuda.Device().compute_capability)
    if capability < MIN_COMPUTE_CAPABILITY:
        raise RuntimeError(f"GPU {problem.device} has compute capability {capability / 10}; cuflash needs {MIN_COMPUTE_CAPABILITY / 10} or newer")
    if max(problem.query_length, problem.key_length) >= launch.MAX_LENGTH:
        raise ValueError(f"lengths are {problem.query_length} and {problem.key_length}; allowed on a GPU: below {launch.MAX_LENGTH}")


def _ready(name, array):
    """The array as the kernels read it: columns side by side, every row at a multiple of 16 bytes. In place where that holds, else a logged copy."""
    if _in_place(array):
        return array
    size = array.dtype.itemsize
    log.info("%s: strides %s of shape %s are not 16-byte rows; copied", name, array.strides, array.shape)
    kept = tuple(slice(None) if stride else slice(0, 1) for stride in array.strides[:-1])  # a broadcast axis is not copied out
    source = array[kept]
    columns = -(-array.shape[-1] * size // 16) * 16 // size
    copy = cupy.zeros((*source.shape[:-1], columns), array.dtype)[..., : array.shape[-1]]
    copy[...] = source
    return cupy.broadcast_to(copy, array.shape)


def _in_place(array):
    whole_rows = all(stride % 16 == 0 or length <= 1 for stride, length in zip(array.strides[:-1], array.shape[:-1]))
    return side_by_side(array) and array.data.ptr % 16 == 0 and whole_rows


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
    family, why = launch.family(cupy.cuda.Device().id)
    return described | {"family": family, "why": why}


def warmup(dtypes, head_dims):
    """Compile forward and backward for these dtypes (names; 'tf32' too) and head dims; yields (kernel, seconds)."""
    device = cupy.cuda.Device().id
    limit = launch.shared_limit(device)
    for precision in dtypes:
        size, kind = tiles.element_bytes(precision), tiles.PRECISIONS[precision]
        for head_dim in head_dims:
            dims = tiles.head_dims(head_dim, head_dim, tiles.head_dims_of(precision))
            forward_tile = tiles.choose(tiles.FORWARD, precision, dims, limit)
            finish, backward, sm80_dims = f"backward_finish<{kind}, {dims[0]}, 0>", None, [dims]
            if launch.family(device)[0] == "sm90" and size == 2:
                own = tiles.head_dims(head_dim, head_dim, tiles.HEAD_DIMS_SM90)
                row = [tile for _, tile in tiles.FORWARD_SM90[max(own)]]
                wanted = [(tile.file, tile.name(precision, own, 0), tile.shared_bytes(own)) for tile in row]
                backward = tiles.backward_sm90(head_dim, head_dim, 0)
            else:
                wanted = [(forward_tile.file, forward_tile.name(precision, dims, 0), forward_tile.shared_bytes(dims, size))]
                if launch.family(device)[0] == "sm90" and tiles.PARTS_LEAST_DIM <= head_dim <= max(tiles.HEAD_DIMS_PARTS[-1]):
                    own = tiles.head_dims(head_dim, head_dim, tiles.HEAD_DIMS_PARTS)
                    for _, tile in tiles.FORWARD_SM90_PARTS[precision][max(own)]:
                        wanted += [(tile.file, tile.name(precision, own, 0), tile.shared_bytes(own, 0, precision))]
                        wanted += [("float32_parts.cu", tiles.float32_parts(precision, own, 0, tile.key_tile), 0)]
                    wanted += _backward_parts(precision, head_dim)
                    standing_by = tiles.backward_parts(precision, head_dim, head_dim, 0)[1]
                    sm80_dims += [standing_by] if standing_by != dims else []
            if backward is not None:
                main, dims = backward
                orders = [(False,), (True,)] + [(True, True)] * (dims in tiles.MAKES_DQ)
                wanted += [(main.file, main.name(precision, dims, 0, *order), main.shared_bytes(dims, *order)) for order in orders]
                finish = tiles.backward_finish_sm90(precision, dims, 0, main.query_tile)
                sm80_dims = []
            for own in sm80_dims:
                main, without_dq, query = (
                    tiles.choose(table, precision, own, limit) for table in (tiles.BACKWARD, tiles.BACKWARD_WITHOUT_DQ, tiles.BACKWARD_QUERY)
                )
                if main.query_gradient:
                    wanted += [(main.file, main.name(precision, own, 0, True), main.shared_bytes(own, size))]
                wanted += [(without_dq.file, without_dq.name(precision, own, 0, False), without_dq.shared_bytes(own, size))]
                wanted += [(query.file, query.name(precision, own, 0), query.shared_bytes(own, size))]
            for own in sm80_dims or [dims]:
                rows = launch.ROWS_PER_BLOCK if backward is None else backward[0].query_tile
                wanted += [("backward_rows.cu", tiles.backward_prepare(precision, own, 0, flag, rows), 0) for flag in (True, False)]
            wanted += [("backward_rows.cu", finish, 0)]
            for file, name, shared_bytes in wanted:
                started = time.perf_counter()
                modules.kernel(file, name, shared_bytes, device)
                yield name, time.perf_counter() - started


def _backward_parts(precision, head_dim):
    """Kernels of the sm90 family for a backward of float32 arrays, beside those of the sm80 family, as warmup wants them."""
    tile, dims = tiles.backward_parts(precision, head_dim, head_dim, 0)
    kernels = [(tile.file, tile.name(precision, dims, 0, in_order), tile.shared_bytes(dims, precision)) for in_order in (False, True)]
    kernels += [("float32_parts.cu", tiles.float32_parts(precision, dims, 0, tile.key_tile), 0)]
    return kernels + [("backward_rows.cu", tiles.backward_finish_sm90(precision, dims, 0, tile.query_tile), 0)]
