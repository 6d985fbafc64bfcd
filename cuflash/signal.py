"""Attention as signal processing: exact Gaussian-kernel smoothing over all pairs, on NumPy or CuPy arrays, in memory linear in the lengths.

A Gaussian weight is a softmax over the keys: with a = query / bandwidth and b = key / bandwidth,

    exp(-|a - b|² / 2)  is proportional, for one query, to  exp(a·b - |b|²/2) = exp([a, 1] · [b, -|b|²/2])

so one more feature, which holds the key's norm, turns kernel smoothing into attention with scale 1. The norm is large where a·b is large, and their
difference is what counts; so the data are centred first, and where products are rounded (16-bit types and TF32) the norm is taken of the rounded
features and spread over three features, which together hold it as exactly as float32 does.

Complex numbers (IQ samples, analytic signals) are two real ones each: distances and means are those of their parts, |a - b|² being the sum over both.
"""

import numpy

from cuflash.api import attention, attention_vjp
from cuflash.complex_arrays import as_complex, as_real
from cuflash.problem import as_array, make_problem, parts_dtype, sums_dtype

__all__ = ["kernel_regression", "kernel_regression_vjp", "noise_level", "nonlocal_means", "nonlocal_means_vjp"]

BLOCK = 1 << 16  # queries for each call of attention: their features need not all exist at once
NORM_SCALE = 64.0  # of the three features of a norm: keeps it inside float16 up to |b| = 2896


def kernel_regression(queries, keys, values, *, bandwidth, dtype=None, precision=None):
    """Nadaraya-Watson regression with a Gaussian kernel, over all pairs of queries and keys.

    ``out[i] = sum_j w[i, j] * values[j] / sum_j w[i, j]`` with ``w[i, j] = exp(-|queries[i] - keys[j]|**2 / (2 * bandwidth**2))``.

    Parameters
    ----------
    queries : array, shape ``(..., L, D)`` or ``(L,)``
        Where to predict: float16, bfloat16, float32, float64, complex64 or complex128. D is 1 to 255 (253 if `dtype` is of 16 bits or with TF32); each
        complex feature counts as two.
    keys : array, shape ``(..., S, D)``, or ``(S,)`` with queries ``(L,)``
        Where the values were observed, of the same dtype. S is at least 1.
    values : array, shape ``(..., S, channels)`` or ``(S,)``
        What was observed, of the same dtype, or of the complex or real one that goes with it: IQ samples at real times, say. Leading dimensions of the
        three arrays broadcast as for `cuflash.attention`.
    bandwidth : float or array, shape ``()`` or ``(D,)``
        Standard deviation of the kernel, of complex features that along each part, in the units of queries and keys; above 0. One for each feature if
        an array of shape ``(D,)``.
    dtype : dtype, optional
        Real, of the products; that of the arrays or of their parts by default. float64 arrays are faster as ``"float32"``; 16-bit types are faster on a
        GPU and round the features.
    precision : str, optional
        As for `cuflash.attention`.

    Returns
    -------
    out : array, shape ``(..., L, channels)``, or ``(..., L)`` for values ``(S,)``
        In the dtype of values.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        Before any work: kinds, places, dtypes, shapes and values that are not as above.

    See Also
    --------
    kernel_regression_vjp : with gradients.

    Notes
    -----
    The squared distance is made from products, so a weight has a relative error of about ``eps * |x|**2 / bandwidth**2``, x being the largest
    query or key after the mean is taken off, and eps the spacing of `dtype` at 1 (of float32 for 16-bit types, after the features are rounded).

    References
    ----------
    Nadaraya, "On estimating regression", Theory of Probability and its Applications 9, 1964; Watson, "Smooth regression analysis", Sankhya A 26, 1964.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash.signal import kernel_regression
    >>> time = np.array([0.0, 1.0, 2.0, 10.0])  # samples need not be evenly spaced
    >>> kernel_regression(np.array([1.0, 9.0]), time, np.array([3.0, 4.0, 5.0, 7.0]), bandwidth=0.5).round(6)
    array([4., 7.])
    """
    return _Regression(queries, keys, values, bandwidth, dtype, precision).forward()


def kernel_regression_vjp(queries, keys, values, *, bandwidth, dtype=None, precision=None):
    """Nadaraya-Watson regression and a function for its gradients.

    Parameters
    ----------
    queries, keys, values, bandwidth, dtype, precision
        As for `kernel_regression`.

    Returns
    -------
    out : array
        As `kernel_regression`.
    vjp : callable
        ``vjp(dout) -> (dqueries, dkeys, dvalues, dbandwidth)``, dout of the shape of out; each result in the shape of its argument, the first three
        in its dtype and dbandwidth in float32 (float64 for float64 and complex128 arrays). Any number of times. Complex gradients are as those of
        `cuflash.attention_backward`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `kernel_regression`; also for dout of another place or shape, or complex where out is real, and the reverse.

    References
    ----------
    As for `kernel_regression`; gradients as in Dao et al., "FlashAttention", 2022, arXiv:2205.14135, appendix B.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash.signal import kernel_regression_vjp
    >>> time = np.arange(4.0)
    >>> out, vjp = kernel_regression_vjp(time, time, time**2, bandwidth=0.5)
    >>> dqueries, dkeys, dvalues, dbandwidth = vjp(np.ones_like(out))
    >>> dvalues.sum().round(6)  # the weights of each query sum to 1
    np.float64(4.0)
    """
    return _Regression(queries, keys, values, bandwidth, dtype, precision).forward_vjp()


def nonlocal_means(x, *, patch=63, bandwidth=None, noise=None, channel_axis=None, dtype=None, precision=None, block=BLOCK, progress=None):
    """Exact non-local means: every sample becomes a mean of all samples of its record, weighted by how alike their surroundings are.

    ``y[i] = sum_j w[i, j] * x[j] / sum_j w[i, j]`` with ``w[i, j] = exp(-|p[i] - p[j]|**2 / (2 * bandwidth**2))``, p[i] being the `patch` samples
    around sample i, ``x[i - patch // 2 : i - patch // 2 + patch]``, of the record continued at both ends by reflection (``numpy.pad(mode="reflect")``).
    No search window and no approximation: the sums run over all pairs.

    Parameters
    ----------
    x : array, shape ``(..., N)``
        One record along the last axis, or a batch of them, each on its own: float16, bfloat16, float32, float64, complex64 (IQ samples, analytic
        signals) or complex128.
    patch : int, default 63
        Samples in a patch, 1 to N. With an odd number the sample is in the middle. On a GPU 31, 63, 127 or 255 (with the norm 32 to 256 features) waste
        nothing; with 16-bit types or TF32, whose norm takes three features, 29, 61, 125 or 253. ``patch * channels`` is at most 255 (253); complex
        channels count twice.
    bandwidth : float or array that broadcasts to the batch ``x.shape[:-1]``, optional
        In the units of x; above 0. By default ``0.5 * noise * sqrt(patch * channels)``: two patches that differ by noise alone weigh about exp(-4).
    noise : float or array that broadcasts to the batch, optional
        Standard deviation of the white noise in x (of complex noise ``sqrt(mean(abs(noise)**2))``, both parts together, as `numpy.std`), for the default
        bandwidth; by default `noise_level`, which waits for the GPU.
    channel_axis : int, optional
        The axis of channels (of a three-component seismogram, say), which share their weights; the last of the other axes is time.
    dtype : dtype, optional
        Real, of the products; that of x or of its parts by default. float64 arrays are faster as ``"float32"``; 16-bit types are faster on a GPU and
        round the patches.
    precision : str, optional
        As for `cuflash.attention`.
    block : int, default 65536
        Queries for each call of attention: bounds the memory for query features.
    progress : callable, optional
        ``progress(done, total)`` after each block of queries; on a GPU when it is queued, not done.

    Returns
    -------
    y : array
        In the shape and dtype of x.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        Before any work: kinds, dtypes, shapes and values that are not as above.

    See Also
    --------
    nonlocal_means_vjp : with gradients.
    noise_level : the default for `noise`.

    Notes
    -----
    It takes ``2 * N**2 * (features + channels)`` floating-point operations and memory for about ``2 * N * (patch * channels + 1)`` numbers. The mean is
    taken off first. A weight has a relative error of about ``eps * |p|**2 / bandwidth**2``, eps as in `kernel_regression`. With a `dtype` of float16,
    patches of ``|p| > 2896 * bandwidth`` overflow and show as NaN.

    References
    ----------
    Buades, Coll & Morel, "A non-local algorithm for image denoising", CVPR 2005; "A review of image denoising algorithms, with a new one", Multiscale
    Modeling & Simulation 4, 2005, section 5. Their h² is 2 * bandwidth**2; the sample itself takes part with weight 1.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash.signal import nonlocal_means
    >>> clean = np.sin(np.arange(2000) / 10)
    >>> noisy = clean + 0.5 * np.random.default_rng(0).standard_normal(2000)
    >>> denoised = nonlocal_means(noisy, noise=0.5)
    >>> bool(np.std(denoised - clean) < 0.3 * np.std(noisy - clean))
    True
    """
    block = _positive_int("block", block)
    return _Means(x, patch, bandwidth, noise, channel_axis, dtype, precision).forward(block, progress)


def nonlocal_means_vjp(x, *, patch=63, bandwidth=None, noise=None, channel_axis=None, dtype=None, precision=None):
    """Exact non-local means and a function for its gradients.

    Parameters
    ----------
    x, patch, bandwidth, noise, channel_axis, dtype, precision
        As for `nonlocal_means`.

    Returns
    -------
    y : array
        As `nonlocal_means`.
    vjp : callable
        ``vjp(dy) -> (dx, dbandwidth)``, dy of the shape of y: dx in the shape and dtype of x; dbandwidth in the shape of the bandwidth, in float32
        (float64 for float64 and complex128 arrays). A bandwidth that was made from `noise`, or from x, counts as given. Any number of times. Complex
        gradients are as those of `cuflash.attention_backward`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As for `nonlocal_means`; also for dy of another place or shape, or complex where y is real, and the reverse.

    References
    ----------
    As for `nonlocal_means`; gradients as in Dao et al., "FlashAttention", 2022, arXiv:2205.14135, appendix B.

    Examples
    --------
    Which bandwidth denoises best? Follow the gradient of the squared error.

    >>> import numpy as np
    >>> from cuflash.signal import nonlocal_means_vjp
    >>> clean = np.sin(np.arange(500) / 10)
    >>> noisy = clean + 0.5 * np.random.default_rng(0).standard_normal(500)
    >>> denoised, vjp = nonlocal_means_vjp(noisy, patch=31, bandwidth=0.7)
    >>> dx, dbandwidth = vjp(2 * (denoised - clean))
    >>> dx.shape, bool(dbandwidth < 0)  # a larger bandwidth is better here
    ((500,), True)
    """
    return _Means(x, patch, bandwidth, noise, channel_axis, dtype, precision).forward_vjp()


def noise_level(x, *, axis=-1):
    """Standard deviation of white noise in a smooth signal, from the median size of second differences.

    Parameters
    ----------
    x : array
        Signals, real or complex, with at least 3 samples along `axis`, NumPy or CuPy.
    axis : int, default -1
        Time.

    Returns
    -------
    sigma : array, shape of x without `axis`
        In float32, or float64 for float64 and complex128 arrays; of complex noise that of both parts together, as `numpy.std`. What the signal itself
        has near the Nyquist frequency counts as noise.

    Raises
    ------
    TypeError
        Kinds and dtypes.
    ValueError
        Shapes.

    References
    ----------
    Gasser, Sroka & Jennen-Steinmetz, "Residual variance and residual pattern in nonlinear regression", Biometrika 73, 1986 (the second differences);
    Hampel, "The influence curve and its role in robust estimation", JASA 69, 1974 (the median).

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash.signal import noise_level
    >>> noise = 0.5 * np.random.default_rng(0).standard_normal(10_000)
    >>> float(noise_level(np.sin(np.arange(10_000) / 100) + noise).round(1))
    0.5
    """
    x, xp, _ = _floating("x", x)
    if x.ndim == 0 or not -x.ndim <= axis < x.ndim or x.shape[axis] < 3:
        raise ValueError(f"x has shape {x.shape} and {axis=}; allowed: at least 3 samples along that axis")
    if x.dtype.kind == "c":
        return xp.hypot(noise_level(x.real, axis=axis), noise_level(x.imag, axis=axis))
    x = xp.moveaxis(x, axis, -1).astype(sums_dtype(x.dtype))
    # Second differences of white noise have variance 1 + 4 + 1; half of a normal variable's absolute values lie below 0.6745.
    return xp.median(xp.abs(xp.diff(x, n=2, axis=-1)), axis=-1) / (0.67448975 * 6**0.5)


class _Kernel:
    """What both smoothers share: the dtype of products, and features with the norm beside them."""

    def __init__(self, xp, dtype, compute_dtype, precision):
        self.xp = xp
        self.dtype = dtype  # of the user's arrays, of complex ones that of their parts
        self.compute_dtype = dtype if compute_dtype is None else _as_dtype(compute_dtype)
        if self.compute_dtype.kind == "c":
            raise TypeError(f"dtype is {self.compute_dtype}; allowed: a real one, as products are made of the parts of complex numbers")
        probe = xp.zeros((1, 1), self.compute_dtype)
        problem = make_problem(probe, probe, probe, {"precision": precision})[0]  # raises for a dtype or precision that attention refuses
        self.options = {"scale": 1.0, "precision": precision}
        self.work_dtype = sums_dtype(self.compute_dtype)
        self.tf32 = problem.precision == "tf32"
        self.norm_columns = 1 if problem.precision in ("float32", "float64") else 3
        self.norm_scale = 1.0 if self.norm_columns == 1 else NORM_SCALE

    def rounded(self, array):
        """As the products will see it, so that norms can be taken of the same numbers."""
        array = array.astype(self.compute_dtype)
        return self._to_tf32(array) if self.tf32 else array

    def _to_tf32(self, array):
        bits = array.view(numpy.uint32)
        return ((bits + numpy.uint32(0x1000)) & numpy.uint32(0xFFFFE000)).view(numpy.float32)

    def check_features(self, description, features):
        limit = 256 - self.norm_columns
        if not 1 <= features <= limit:
            raise ValueError(f"{description}; allowed: 1 to {limit} features (256, less {self.norm_columns} for the norm)")

    def buffer(self, *shape):
        """An empty array for features (..., length, features) and, behind them, the columns of the norm."""
        return self.empty_rows(*shape[:-1], shape[-1] + self.norm_columns)

    def empty_rows(self, *shape):
        """On a GPU every row starts at a multiple of 16 bytes, where the kernels read it in place: otherwise each call of attention would copy."""
        columns = shape[-1] if self.xp is numpy else -(-shape[-1] * self.compute_dtype.itemsize // 16) * 16 // self.compute_dtype.itemsize
        return self.xp.empty((*shape[:-1], columns), self.compute_dtype)[..., : shape[-1]]

    def finish_queries(self, buffer):
        buffer[..., -self.norm_columns :] = self.norm_scale

    def finish_keys(self, buffer):
        """Write -|b|²/2 behind the features, as a sum of numbers that the products do not round."""
        features = buffer.shape[-1] - self.norm_columns
        for start in range(0, buffer.shape[-2], BLOCK):  # in blocks: squares of all features at once would take as much memory as the features
            part = buffer[..., start : start + BLOCK, :]
            rest = self.xp.square(part[..., :features].astype(self.work_dtype)).sum(-1) * self.work_dtype.type(-0.5 / self.norm_scale)
            for column in range(features, buffer.shape[-1]):
                piece = self.rounded(rest)
                part[..., column] = piece
                rest = rest - piece.astype(self.work_dtype)

    def unit_size(self, dout):
        """Its size, and dout divided by it: gradients are linear in dout, whose units could be beyond the range of float16."""
        if not dout.size:
            return 1, dout.astype(self.compute_dtype)
        size = self.xp.abs(dout).max()
        size = self.xp.where(size > 0, size, self.xp.ones_like(size))
        return size, (dout / size).astype(self.compute_dtype)

    def query_gradient(self, dq):
        return dq[..., : -self.norm_columns].astype(self.work_dtype)

    def key_gradient(self, dk, k):
        """d/db of a·b - |b|²/2. The columns of the norm have equal gradients, so the first speaks for all."""
        features = k.shape[-1] - self.norm_columns
        dnorm = dk[..., features : features + 1].astype(self.work_dtype) / self.work_dtype.type(self.norm_scale)
        return dk[..., :features].astype(self.work_dtype) - k[..., :features].astype(self.work_dtype) * dnorm


class _Regression:
    def __init__(self, queries, keys, values, bandwidth, dtype, precision):
        queries, xp, device = _floating("queries", queries)
        keys, values = _beside("queries", queries, device, keys=keys, values=values)
        self.shapes = queries.shape, keys.shape, values.shape
        self.complex_features, self.complex_values = queries.dtype.kind == "c", values.dtype.kind == "c"
        if queries.ndim == keys.ndim == 1:
            queries, keys = queries[:, None], keys[:, None]
        self.values = values[:, None] if values.ndim == 1 else values
        if queries.ndim < 2 or keys.ndim < 2 or self.values.ndim < 2:
            raise ValueError(f"queries, keys and values have shapes {self.shapes}; allowed: (..., L, D), (..., S, D), (..., S, channels), or 1-D arrays")
        features = queries.shape[-1]
        if keys.shape[-1] != features or keys.shape[-2] != self.values.shape[-2]:
            raise ValueError(f"queries, keys and values have shapes {self.shapes}; allowed: the same D in queries and keys, the same S in keys and values")
        if keys.shape[-2] == 0:
            raise ValueError(f"keys has shape {keys.shape}; allowed: at least one key")
        self.kernel = kernel = _Kernel(xp, parts_dtype(queries.dtype), dtype, precision)
        self.bandwidth = widths = _positive("bandwidth", bandwidth, xp, kernel.work_dtype)
        if self.bandwidth.shape not in ((), (1,), (features,)):
            raise ValueError(f"bandwidth has shape {self.bandwidth.shape}; allowed: () or ({features},)")
        described = f"queries has {features} features"
        if self.complex_features:
            queries, keys = as_real("queries", queries), as_real("keys", keys)
            widths = widths.repeat(2) if widths.shape == (features,) else widths
            features, described = 2 * features, f"{described} of two parts each"
        if self.complex_values:
            self.values = as_real("values", self.values)
        self.widths = widths  # the bandwidth of each real feature
        kernel.check_features(described, features)
        # The weights do not change when queries and keys move together, and near 0 less is rounded.
        middle = keys.reshape(-1, features).mean(0, dtype=kernel.work_dtype)
        self.a, self.b = (kernel.rounded((array.astype(kernel.work_dtype) - middle) / self.widths) for array in (queries, keys))
        self.q, self.k = (kernel.buffer(*array.shape) for array in (self.a, self.b))
        self.q[..., :features], self.k[..., :features] = self.a, self.b
        kernel.finish_queries(self.q)
        kernel.finish_keys(self.k)
        self.v = self.values.astype(kernel.compute_dtype, copy=False)

    def forward(self):
        return self._result(attention(self.q, self.k, self.v, **self.kernel.options))

    def _result(self, out):
        out = self._given_dtype(out, self.complex_values)
        return out[..., 0] if len(self.shapes[2]) == 1 else out

    def _given_dtype(self, array, is_complex):
        array = array.astype(self.kernel.dtype, copy=False)
        return as_complex(array) if is_complex else array

    def forward_vjp(self):
        out, attention_gradients = attention_vjp(self.q, self.k, self.v, **self.kernel.options)
        result = self._result(out)
        kernel, work = self.kernel, self.kernel.work_dtype

        def vjp(dout):
            """Gradients of (queries, keys, values, bandwidth), given that of the result."""
            dout = _gradient_of("dout", dout, result)
            if self.complex_values:
                dout = as_real("dout", dout[..., None] if len(self.shapes[2]) == 1 else dout)
            size, dout = kernel.unit_size(dout.astype(work).reshape(out.shape))
            dq, dk, dv = attention_gradients(dout)
            da, db = kernel.query_gradient(dq) * size, kernel.key_gradient(dk, self.k) * size
            stretch = sum((g * array.astype(work)).reshape(-1, array.shape[-1]).sum(0) for g, array in ((da, self.a), (db, self.b)))
            dwidths = -stretch / self.widths
            if self.complex_features:
                dwidths = dwidths.reshape(-1, 2).sum(-1)
            gradients = (da / self.widths, self.complex_features), (db / self.widths, self.complex_features), (dv.astype(work) * size, self.complex_values)
            gradients = [self._given_dtype(g, is_complex).reshape(shape) for (g, is_complex), shape in zip(gradients, self.shapes)]
            return *gradients, _sum_to(dwidths, self.bandwidth.shape)

        return result, vjp


class _Means:
    """One record, or a batch, as u = (x - mean) / bandwidth of shape (..., channels, N), reflected at the ends in `padded`."""

    def __init__(self, x, patch, bandwidth, noise, channel_axis, dtype, precision):
        x, xp, _ = _floating("x", x)
        self.complex = x.dtype.kind == "c"
        self.kernel = kernel = _Kernel(xp, parts_dtype(x.dtype), dtype, precision)
        self.channel_axis = channel_axis
        if channel_axis is not None and not (isinstance(channel_axis, int) and x.ndim > 1 and -x.ndim <= channel_axis < x.ndim):
            raise ValueError(f"channel_axis is {channel_axis!r} and x has shape {x.shape}; allowed: None, or an axis beside time")
        if x.ndim == 0:
            raise ValueError("x has no dimensions; allowed: (..., N)")
        self.patch = _positive_int("patch", patch)
        rows = self._rows(x)
        parts = 2 if self.complex else 1
        channels, self.length = rows.shape[-2] // parts, rows.shape[-1]
        if self.patch > self.length:
            raise ValueError(f"patch is {patch} and x has {self.length} samples along time; allowed: 1 to {self.length}")
        described = f"patch * channels is {self.patch} * {channels}" + (" complex ones, of two parts each" if self.complex else "")
        kernel.check_features(described, self.patch * channels * parts)
        rows = rows.astype(kernel.work_dtype)
        if bandwidth is None:
            noise = self._estimated_noise(rows) * parts**0.5 if noise is None else _positive("noise", noise, xp, kernel.work_dtype)
            bandwidth = noise * kernel.work_dtype.type(0.5 * (self.patch * channels) ** 0.5)
        elif noise is not None:
            raise ValueError("noise and bandwidth are both given; allowed: one of them")
        self.bandwidth = _positive("bandwidth", bandwidth, xp, kernel.work_dtype)
        batch = rows.shape[:-2]
        if not _broadcasts_to(self.bandwidth.shape, batch):
            raise ValueError(f"bandwidth (or noise) has shape {self.bandwidth.shape}; allowed: a number, or a shape that broadcasts to the batch {batch}")
        self.h = self.bandwidth[..., None, None]
        self.mean = rows.mean(-1, keepdims=True)
        self.u = kernel.rounded((rows - self.mean) / self.h)
        self.left = self.patch // 2
        self.right = self.patch - 1 - self.left
        self.padded = self._pad(self.u)

    def _rows(self, array):
        """(..., channels, N), channels being 1 without a channel axis; twice as many for the parts of complex numbers."""
        rows = array[..., None, :] if self.channel_axis is None else self.kernel.xp.moveaxis(array, self.channel_axis, -2)
        return as_real("x", rows.swapaxes(-1, -2)).swapaxes(-1, -2) if self.complex else rows

    def _estimated_noise(self, rows):
        """One for each record: the channels share their weights."""
        sigma = self.kernel.xp.sqrt(self.kernel.xp.square(noise_level(rows)).mean(-1))
        if not bool((sigma > 0).all()):
            raise ValueError("the noise estimated from x is not above 0 for every record; give noise or bandwidth")
        return sigma

    def _pad(self, u):
        ends = u[..., 1 : self.left + 1][..., ::-1], u[..., self.length - 1 - self.right : self.length - 1][..., ::-1]
        return self.kernel.xp.concatenate((ends[0], u, ends[1]), axis=-1)

    def _patches(self, start, stop):
        """A buffer of features, filled with the patches of samples start to stop; the norm columns are still empty."""
        channels = self.u.shape[-2]
        buffer = self.kernel.buffer(*self.u.shape[:-2], stop - start, channels * self.patch)
        windows = self.kernel.xp.lib.stride_tricks.sliding_window_view(self.padded[..., start : stop + self.patch - 1], self.patch, axis=-1)
        for channel in range(channels):
            buffer[..., channel * self.patch : (channel + 1) * self.patch] = windows[..., channel, :, :]
        return buffer

    def _queries(self, start, stop):
        buffer = self._patches(start, stop)
        self.kernel.finish_queries(buffer)
        return buffer

    def _keys(self):
        buffer = self._patches(0, self.length)
        self.kernel.finish_keys(buffer)
        return buffer

    def _values(self):
        values = self.kernel.empty_rows(*self.u.shape[:-2], self.length, self.u.shape[-2])
        values[...] = self.u.swapaxes(-1, -2)
        return values

    def _result(self, out):
        """Smoothed u of shape (..., N, channels) -> y in the shape of x."""
        rows = out.astype(self.kernel.work_dtype).swapaxes(-1, -2) * self.h + self.mean
        return self._shaped(rows)

    def _shaped(self, rows):
        """The reverse of `_rows`, in the dtype of x."""
        xp = self.kernel.xp
        rows = rows.astype(self.kernel.dtype)
        if self.complex:
            rows = as_complex(xp.ascontiguousarray(rows.swapaxes(-1, -2))).swapaxes(-1, -2)
        return xp.ascontiguousarray(rows[..., 0, :] if self.channel_axis is None else xp.moveaxis(rows, -2, self.channel_axis))

    def forward(self, block, progress):
        keys, values = self._keys(), self._values()
        outs = []
        for start in range(0, self.length, block):
            stop = min(start + block, self.length)
            outs.append(attention(self._queries(start, stop), keys, values, **self.kernel.options))
            if progress is not None:
                progress(stop, self.length)
        return self._result(self.kernel.xp.concatenate(outs, axis=-2))

    def forward_vjp(self):
        keys = self._keys()
        out, attention_gradients = attention_vjp(self._queries(0, self.length), keys, self._values(), **self.kernel.options)
        y = self._result(out)
        kernel, work = self.kernel, self.kernel.work_dtype

        def vjp(dy):
            """Gradients of (x, bandwidth), given that of y."""
            dy = self._rows(_gradient_of("dy", dy, y)).astype(work)
            size, dout = kernel.unit_size((dy * self.h).swapaxes(-1, -2))
            dq, dk, dv = attention_gradients(dout)
            dpatches = kernel.query_gradient(dq) + kernel.key_gradient(dk, keys)
            # y = h f((x - mean) / h) + mean, and f(u + c) = f(u) + c: moving the mean changes nothing.
            du = (self._unpatch(dpatches) + dv.swapaxes(-1, -2).astype(work)) * size
            stretch = dy * out.swapaxes(-1, -2).astype(work) - du * self.u.astype(work) / self.h
            return self._shaped(du / self.h), _sum_to(stretch.sum((-1, -2)), self.bandwidth.shape)

        return y, vjp

    def _unpatch(self, dpatches):
        """The transpose of taking patches: each sample gathers from all patches that it is in, and the reflected ends fold back."""
        dpadded = self.kernel.xp.zeros(self.padded.shape, self.kernel.work_dtype)
        for channel in range(dpadded.shape[-2]):
            for tap in range(self.patch):
                dpadded[..., channel, tap : tap + self.length] += dpatches[..., channel * self.patch + tap]
        du = dpadded[..., self.left : self.left + self.length].copy()
        du[..., 1 : self.left + 1] += dpadded[..., : self.left][..., ::-1]
        du[..., self.length - 1 - self.right : self.length - 1] += dpadded[..., self.left + self.length :][..., ::-1]
        return du


def _floating(name, array):
    """The array, its module and its GPU index, checked to be of floating-point numbers."""
    array, device = as_array(name, array)
    if array.dtype.kind not in "fc" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} has dtype {array.dtype}; allowed: floating-point numbers, such as {name}.astype(numpy.float32)")
    if device is None:
        return array, numpy, device
    import cupy

    return array, cupy, device


def _beside(first_name, first, device, **arrays):
    """keys and values, checked to be where the queries are and of their dtype; values may be complex where queries are real, and the reverse."""
    checked = []
    for name, array in arrays.items():
        array, place = as_array(name, array)
        if place != device:
            raise TypeError(f"{name} and {first_name} are in different places; allowed: all arrays NumPy, or all on one GPU")
        if array.dtype != first.dtype and not (name == "values" and parts_dtype(array.dtype) == parts_dtype(first.dtype)):
            raise TypeError(f"{name} has dtype {array.dtype} and {first_name} has {first.dtype}; allowed: one dtype")
        checked.append(array)
    return checked


def _gradient_of(name, gradient, result):
    gradient, device = as_array(name, gradient)
    if device != as_array("result", result)[1]:
        raise TypeError(f"{name} is not where the result is; allowed: a gradient of the same module and GPU")
    if (gradient.dtype.kind == "c") != (result.dtype.kind == "c"):
        raise TypeError(f"{name} has dtype {gradient.dtype} and the result has {result.dtype}; allowed: both real, or both complex")
    if gradient.shape != result.shape:
        raise ValueError(f"{name} has shape {gradient.shape}; allowed here: {result.shape}")
    return gradient


def _as_dtype(dtype):
    if isinstance(dtype, str) and dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    return numpy.dtype(dtype)


def _positive(name, value, xp, dtype):
    """As an array of the module. Numbers that are already on a GPU are not looked at, which would wait for it: a wrong one shows as NaN."""
    if not isinstance(value, numpy.ndarray) and hasattr(value, "__cuda_array_interface__"):
        if xp is numpy:
            raise TypeError(f"{name} is on a GPU and the signal is not; allowed: a number or a NumPy array")
        array = xp.asarray(value)
        if array.dtype.kind == "c":
            raise TypeError(f"{name} has dtype {array.dtype}; allowed: real numbers above 0")
        return array.astype(dtype, copy=False)
    try:
        host = numpy.asarray(value)
        host = host.astype(numpy.float64, casting="same_kind" if host.dtype.kind == "c" else "unsafe")
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; allowed: a real number above 0, or an array of them") from None
    with numpy.errstate(over="ignore", under="ignore"):
        host = host.astype(dtype)
    if not (numpy.isfinite(host) & (host > 0)).all():
        raise ValueError(f"{name} is {value!r}; allowed: finite numbers above 0 (in {dtype})")
    return xp.asarray(host)


def _positive_int(name, value):
    if not isinstance(value, (int, numpy.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; allowed: an int of 1 or more")
    if value < 1:
        raise ValueError(f"{name} is {value}; allowed: 1 or more")
    return int(value)


def _broadcasts_to(shape, target):
    try:
        return numpy.broadcast_shapes(shape, target) == tuple(target)
    except ValueError:
        return False


def _sum_to(array, shape):
    """Summed over the dimensions along which `shape` was broadcast."""
    for _ in range(array.ndim - len(shape)):
        array = array.sum(0)
    for axis, length in enumerate(shape):
        if length == 1:
            array = array.sum(axis, keepdims=True)
    return array.reshape(shape)
