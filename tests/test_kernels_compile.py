"""Every kernel that the tuning table can choose compiles for its GPUs without spills, and Python and CUDA agree on the argument, the tiles and the enums.

NVRTC compiles to machine code without a GPU.
"""

import dataclasses
import itertools
import logging
import re
import shutil

import pytest
from support import cupy


def nvrtc_is_usable():
    try:
        return cupy is not None and bool(cupy.cuda.nvrtc.getVersion())
    except Exception:  # a library that cannot be loaded may raise anything
        return False


if not nvrtc_is_usable():
    pytest.skip("needs CuPy and NVRTC", allow_module_level=True)

from cuflash.cupy_backend import launch, modules, tiles  # noqa: E402

# Shared memory that a block can have, in bytes. sm_86 stands for sm_89 and sm_120 too, which have as much.
SHARED_LIMITS = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448}
SMALLEST_LIMIT = min(SHARED_LIMITS.values())
FEW_BYTES = 40  # of a thread that has 1,020 in registers


def choices():
    """(architecture, precision, head dims); fewer of them for sm_80, whose instructions are those of sm_86."""
    for architecture in SHARED_LIMITS:
        for precision in tiles.PRECISIONS:
            for dims in tiles.head_dims_of(precision):
                if architecture != "sm_80" or (precision in ("bfloat16", "float32", "float64") and dims[0] == dims[1]):
                    yield pytest.param(architecture, precision, dims, id=f"{architecture}-{precision}-{dims[0]}-{dims[1]}")


def compile_program(source, names=(), architecture="sm_90"):
    """The log; NVRTCError with the log in it if it does not compile. Options are those that CuPy compiles with."""
    nvrtc = cupy.cuda.nvrtc
    program = nvrtc.createProgram(source, "test.cu", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        options = (f"-arch={architecture}", "--std=c++17", f"-I{modules.kernels_folder()}", "-ftz=true", "--device-as-default-execution-space")
        try:
            nvrtc.compileProgram(program, (*options, "--ptxas-options=-v"))
        except nvrtc.NVRTCError as error:
            raise AssertionError(f"does not compile for {architecture}: {', '.join(names)}\n{nvrtc.getProgramLog(program)}") from error
        log = nvrtc.getProgramLog(program)
        assert len(nvrtc.getCUBIN(program)) > 0
        return log, [nvrtc.getLoweredName(program, name) for name in names]
    finally:
        nvrtc.destroyProgram(program)


def spills(file, names, architecture):
    """What the compiler kept in local memory, and what it gave up; an empty list if nothing."""
    log, lowered = compile_program(f'#include "{file}"\n', names, architecture)
    found = []
    for name, mangled in zip(names, lowered):
        report = re.search(rf"Function properties for {re.escape(mangled)}\n.*?(\d+ bytes stack frame.*)", log)
        assert report, f"the compiler says nothing of {name}:\n{log}"
        if report[1] != "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads":
            found.append(f"{name} for {architecture}: {report[1]}")
    # C75xx: instructions that were meant to overlap and do not, registers that could not be handed over.
    return found + re.findall(r".*\bC75\d\d\b.*", log)


def names_of(options, architecture, precision, dims):
    """The instances, by file, that calls with these options take; forward, backward with and without dQ, dQ alone, and the gradient of a bias."""
    limit = SHARED_LIMITS[architecture]
    forward, query = (tiles.choose(table, precision, dims, limit) for table in (tiles.forward_table(options), tiles.BACKWARD_QUERY))
    backward, without_dq = (tiles.choose(tiles.backward_table(options, with_dq), precision, dims, limit) for with_dq in (True, False))
    size = tiles.element_bytes(precision)
    staged = tiles.STAGED_BIAS if options & tiles.BIAS and forward.shared_bytes(dims, size, max(4, size)) <= limit else 0
    names = {forward.file: [forward.name(precision, dims, options | staged)]}
    if not options & tiles.LONG_SUMS:
        names[backward.file] = [backward.name(precision, dims, options, True)] if backward.query_gradient else []
        names[backward.file] += [without_dq.name(precision, dims, options, False)]
        names[query.file] = [query.name(precision, dims, options)]
        if options & tiles.BIAS:
            bias = tiles.choose(tiles.BACKWARD_BIAS, precision, dims, limit)
            names[bias.file] = [bias.name(precision, dims, options)]
    return names


@pytest.mark.parametrize(("architecture", "precision", "dims"), list(choices()))
def test_instances(architecture, precision, dims):
    names = names_of(0, architecture, precision, dims)
    if precision not in ("float32", "float64"):
        for file, more in names_of(tiles.LONG_SUMS, architecture, precision, dims).items():
            names[file] += more
    found = [spill for file, own in names.items() for spill in spills(file, own, architecture)]
    assert not found, "\n".join(found)


BIAS_GRADIENT = tiles.BIAS | tiles.BIAS_GRADIENT
BIAS_GRADIENTS = (tiles.BIAS_GRADIENT, tiles.BIAS_ONE_ROW, tiles.BIAS_ONE_COLUMN, tiles.BIAS_UNSHARED)  # of the backward of sm90 alone
ALL_OPTIONS = sum(tiles.OPTIONS) - tiles.LONG_SUMS - tiles.BIAS_FLOAT32 - tiles.STAGED_BIAS - tiles.SPLIT_KEYS - sum(BIAS_GRADIENTS)
WHICH_SCORES = tiles.WINDOW | tiles.PACKED | tiles.LENGTHS | tiles.SINKS


SETS_OF_OPTIONS = (WHICH_SCORES, tiles.SOFTCAP, tiles.BIAS, tiles.MASK, tiles.ALIBI, tiles.DROPOUT, tiles.SCALE_FIRST, ALL_OPTIONS)


@pytest.mark.parametrize(
    ("options", "precision", "dims"),
    [
        *itertools.product(SETS_OF_OPTIONS, ("bfloat16", "float32"), [(64, 64), (128, 128), (192, 128)]),
        *itertools.product((tiles.SOFTCAP, ALL_OPTIONS), ("float64",), [(64, 64), (128, 128), (256, 256)]),
    ],
)
def test_instances_with_options(options, precision, dims):
    """Few of the thousands of combinations. Only backward tiles of 16 bits at 64 and 128, chosen for calls without options, keep a few registers in memory."""
    for file, names in names_of(options, "sm_90", precision, dims).items():
        allowed = FEW_BYTES if (file, precision, dims[0] <= 128) == ("backward_sm80.cu", "bfloat16", True) else 0
        for spill in spills(file, names, "sm_90"):
            stored = re.search(r"(\d+) bytes spill stores", spill)
            assert stored and int(stored[1]) <= allowed, spill


NOT_ALONE = (tiles.BIAS_FLOAT32, tiles.STAGED_BIAS, tiles.LONG_SUMS, *BIAS_GRADIENTS)
SM90_OPTIONS = (0, tiles.LONG_SUMS, WHICH_SCORES, *(own for own in tiles.OPTIONS if own not in NOT_ALONE))
SM90_OPTIONS += (tiles.SPLIT_KEYS | tiles.LONG_SUMS, (tiles.SPLIT_KEYS | ALL_OPTIONS) & ~(tiles.PACKED | tiles.SINKS))
SLOPED = tiles.ALIBI | tiles.BIAS | tiles.MASK  # with ALIBI in the products: most registers
ALL_CHANGES = tiles.SOFTCAP | tiles.BIAS | tiles.MASK | tiles.ALIBI | tiles.DROPOUT
STAGED_BIAS = (tiles.BIAS | tiles.STAGED_BIAS, (tiles.BIAS | tiles.STAGED_BIAS | WHICH_SCORES) & ~tiles.PACKED)


@pytest.mark.parametrize("dims", tiles.HEAD_DIMS_SM90, ids=str)
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_instances_of_sm90(precision, dims):
    """No spills, and no note of the compiler that it put a wait between products, or did not hand over registers."""
    options = (
        (*SM90_OPTIONS, *STAGED_BIAS, tiles.BIAS | tiles.BIAS_FLOAT32, ALL_OPTIONS, SLOPED)
        if precision == "bfloat16"
        else (0, WHICH_SCORES, tiles.SOFTCAP, tiles.ALIBI)
    )
    chosen = [(tiles.forward_sm90(dims, own, queries), own) for own in options for queries in (50, 500, 1000, 5000)]
    names = {tile.name(precision, dims, own): None for tile, own in chosen if tile is not None}
    assert spills("forward_sm90.cu", list(names), "sm_90a") == []


@pytest.mark.parametrize("dims", tiles.HEAD_DIMS_PARTS, ids=str)
@pytest.mark.parametrize("precision", tiles.PARTS)
def test_instances_of_sm90_for_float32(precision, dims):
    options = (0, WHICH_SCORES, tiles.BIAS | tiles.SCALE_FIRST, ALL_OPTIONS) if precision == "float32" else (0, ALL_OPTIONS)
    chosen = [(tiles.forward_parts(precision, dims, own, 5000), own) for own in options]
    assert spills("forward_sm90.cu", [tile.name(precision, dims, own) for tile, own in chosen], "sm_90a") == []
    names = {tiles.float32_parts(precision, dims, own, tile.key_tile) for tile, own in chosen}
    assert spills("float32_parts.cu", sorted(names), "sm_90") == []


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("dims", tiles.BACKWARD_SM90, ids=str)
def test_backward_instances_of_sm90(precision, dims):
    which = WHICH_SCORES & ~tiles.SINKS
    sets = {0, which}
    if precision == "bfloat16":
        own_sets = (*SM90_OPTIONS, tiles.BIAS | tiles.BIAS_FLOAT32, tiles.SCALE_FIRST | tiles.LENGTHS)
        sets |= {own for own in own_sets if not own & (tiles.SINKS | tiles.LONG_SUMS | tiles.SPLIT_KEYS)}
    if precision == "bfloat16" and dims in tiles.BACKWARD_SM90_WITH_OPTIONS:
        sets |= {tiles.MASK | tiles.ALIBI, ALL_CHANGES, ALL_CHANGES & ~tiles.SOFTCAP | tiles.SCALE_FIRST}
    wider = sets | {own | which for own in sets}
    chosen = [(own, in_order, tiles.backward_sm90(*dims, own)) for in_order in (False, True) for own in (sets if in_order else wider)]
    names = [tile[0].name(precision, dims, own, in_order) for own, in_order, tile in chosen if tile is not None]
    cut = {own | lengths for own in sets if not own & which for lengths in (0, tiles.LENGTHS)}
    cut_tiles = [(own, tiles.backward_sm90(*dims, own)) for own in sorted(cut)]
    names += [tile[0].name(precision, dims, own, False, cut=True) for own, tile in cut_tiles if tile is not None]
    if dims in tiles.MAKES_DQ:
        names += [tiles.backward_sm90(*dims, own)[0].name(precision, dims, own, True, True) for own in sets if not own & (which & ~tiles.PACKED | tiles.BIAS)]
        names += [tiles.backward_sm90(*dims, own)[0].name(precision, dims, own, True, True) for own in (tiles.PACKED, tiles.PACKED | tiles.MASK)]
    assert len(names) >= (20 if precision == "bfloat16" else 4)
    assert spills(tiles.BACKWARD_SM90[dims].file, names, "sm_90a") == []


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)], ids=str)
def test_backward_instances_of_sm90_with_the_gradient_of_a_bias(dims):
    """These are at the limit of registers."""
    which = WHICH_SCORES & ~tiles.SINKS
    kinds = (0, tiles.BIAS_UNSHARED, tiles.BIAS_ONE_ROW, tiles.BIAS_ONE_COLUMN, tiles.BIAS_ONE_ROW | tiles.BIAS_ONE_COLUMN)
    sets = [BIAS_GRADIENT | kind for kind in kinds] + [BIAS_GRADIENT | which | kind for kind in kinds[:4]] + [BIAS_GRADIENT | tiles.BIAS_FLOAT32]
    sets += [BIAS_GRADIENT | which | ALL_CHANGES & ~tiles.SOFTCAP | kind for kind in kinds]
    chosen = [(own, tiles.backward_sm90(*dims, own)) for own in sets]
    assert all(tile[1] == dims for _, tile in chosen)
    assert spills("backward_sm90.cu", [tile.name("bfloat16", dims, own, False) for own, (tile, _) in chosen], "sm_90a") == []


@pytest.mark.parametrize("precision", tiles.PARTS)
def test_backward_instances_of_sm90_for_float32(precision):
    which, scaled = WHICH_SCORES & ~tiles.SINKS, tiles.BIAS | tiles.SCALE_FIRST
    changes = (0, tiles.SOFTCAP, scaled, tiles.ALIBI | tiles.SCALE_FIRST, tiles.DROPOUT) if precision == "float32" else (0, scaled)
    names = []
    for dims in tiles.BACKWARD_SM90_PARTS[precision]:
        for in_order, own in ((False, 0), (True, which), *((False, own | which) for own in changes)):
            tile, _ = tiles.backward_parts(precision, *dims, own)
            names.append(tile.name(precision, dims, own, in_order))
    assert spills("backward_parts_sm90.cu", names, "sm_90a") == []


def test_sizes_of_sm90_backward_tiles_for_float32():
    conditions = []
    for precision, rows in tiles.BACKWARD_SM90_PARTS.items():
        for dims, tile in rows.items():
            assert tile.shared_bytes(dims, precision) <= SHARED_LIMITS["sm_90"]
            struct = f"BackwardPartsSm90Tiles<{', '.join(map(str, (tiles.PARTS[precision], *dims, *dataclasses.astuple(tile))))}>"
            sizes = {"SHARED_BYTES": tile.shared_bytes(dims, precision), "THREADS": tile.threads, "KEY_TILE": tile.key_tile, "QUERY_TILE": tile.query_tile}
            conditions += [f"{struct}::{name} == {value}" for name, value in sizes.items()]
    compile_program(program_of_assertions("backward_parts_sm90.cu", conditions), architecture="sm_90a")


@pytest.mark.parametrize("order", [(False,), (True,), (True, True)], ids=str)
@pytest.mark.parametrize(("dims", "tile"), [*tiles.BACKWARD_SM90.items(), *tiles.BACKWARD_SM90_WITH_OPTIONS.items()], ids=str)
def test_sizes_of_sm90_backward_tiles(dims, tile, order):
    if len(order) == 2 and dims not in tiles.MAKES_DQ:
        pytest.skip("no key block makes dQ at these head dims")
    more = [str(value).lower() for value in (*order, False)[:2]] if tile.kernel == "backward_sm90" else []
    struct = f"{tile.kernel.title().replace('_', '')}Tiles<{', '.join(map(str, (*dims, *dataclasses.astuple(tile), *more)))}>"
    sizes = {"SHARED_BYTES": tile.shared_bytes(dims, *order), "THREADS": tile.threads, "KEY_TILE": tile.key_tile}
    assert tile.shared_bytes(dims, *order) <= SHARED_LIMITS["sm_90"]
    conditions = [f"{struct}::{name} == {value}" for name, value in sizes.items()]
    compile_program(program_of_assertions(tile.file, conditions), architecture="sm_90a")


def test_sizes_of_sm90_tiles():
    conditions = set()
    for table in (
        tiles.FORWARD_SM90,
        tiles.FORWARD_SM90_WITH_OPTION,
        tiles.FORWARD_SM90_DROPOUT,
        tiles.FORWARD_SM90_ALIBI,
        tiles.FORWARD_SM90_WITH_OPTIONS,
        tiles.FORWARD_SM90_LONG_SUMS,
        tiles.FORWARD_SM90_SPLIT_KEYS,
        tiles.FORWARD_SM90_STAGED_BIAS,
    ):
        options = tiles.LONG_SUMS if table in (tiles.FORWARD_SM90_LONG_SUMS, tiles.FORWARD_SM90_SPLIT_KEYS) else 0
        options |= tiles.STAGED_BIAS if table is tiles.FORWARD_SM90_STAGED_BIAS else 0
        with_slopes = (tiles.FORWARD_SM90_ALIBI, tiles.FORWARD_SM90_WITH_OPTIONS, tiles.FORWARD_SM90_SPLIT_KEYS)
        options |= tiles.ALIBI if table in with_slopes else 0
        for dims, row in table.items():
            dims = dims if isinstance(dims, tuple) else (dims, dims)
            for _, tile in row:
                assert tile.shared_bytes(dims, options) <= SHARED_LIMITS["sm_90"], (dims, tile)
                struct = f"ForwardSm90Tiles<{', '.join(map(str, (*dims, options, tile.warpgroups, tile.key_tile, tile.stages)))}>"
                sizes = {"SHARED_BYTES": tile.shared_bytes(dims, options), "THREADS": tile.threads, "QUERY_TILE": tile.query_tile}
                conditions |= {f"{struct}::{name} == {value}" for name, value in sizes.items()}
    assert len(conditions) > 20
    for table in (tiles.FORWARD_SM90_PARTS, tiles.FORWARD_SM90_PARTS_WITH_OPTIONS):
        for precision, rows in table.items():
            for dim, row in rows.items():
                for _, tile in row:
                    shared_bytes = tile.shared_bytes((dim, dim), 0, precision)
                    assert shared_bytes <= SHARED_LIMITS["sm_90"], (precision, dim, tile)
                    numbers = (dim, dim, 0, tile.warpgroups, tile.key_tile, tile.stages, tiles.PARTS[precision])
                    conditions.add(f"ForwardSm90Tiles<{', '.join(map(str, numbers))}>::SHARED_BYTES == {shared_bytes}")
    conditions |= {f"parts_of({kind}) == {tiles.PARTS.get(precision, 0)}" for precision, kind in tiles.PRECISIONS.items()}
    compile_program(program_of_assertions("forward_sm90.cu", sorted(conditions)), architecture="sm_90a")


@pytest.mark.parametrize("architecture", SHARED_LIMITS)
@pytest.mark.parametrize("precision", tiles.PRECISIONS)
def test_row_kernels(architecture, precision):
    kind = tiles.PRECISIONS[precision]
    head_dims = sorted({head_dim for head_dim, _ in tiles.head_dims_of(precision)})
    rows = (0, tiles.PACKED | tiles.LENGTHS | tiles.SINKS)
    flags = (True, False)
    names = [
        tiles.backward_prepare(precision, (head_dim,), options, flag, launch.ROWS_PER_BLOCK) for head_dim in head_dims for options in rows for flag in flags
    ]
    names += [f"backward_finish<{kind}, {head_dim}, {options & ~tiles.SINKS}>" for head_dim in head_dims for options in rows]
    if architecture == "sm_90" and precision != "float64":
        sm90 = tiles.BACKWARD_SM90_PARTS[precision] if precision in tiles.PARTS else tiles.BACKWARD_SM90
        names += [tiles.backward_finish_sm90(precision, dims, options & ~tiles.SINKS, tile.query_tile) for dims, tile in sm90.items() for options in rows]
        if precision not in tiles.PARTS:
            own = [(dims, tile.query_tile) for dims, tile in sm90.items()]
            rows += (tiles.PACKED, tiles.PACKED | tiles.SINKS)  # of these key blocks may make dQ
            names += [tiles.backward_prepare(precision, dims, options, flag, query_tile) for dims, query_tile in own for options in rows for flag in flags]
    assert spills("backward_rows.cu", names, architecture) == []


@pytest.mark.parametrize("architecture", SHARED_LIMITS)
def test_mask_words(architecture):
    assert spills("mask_words.cu", ["mask_words"], architecture) == []


@pytest.mark.parametrize("architecture", SHARED_LIMITS)
def test_outside_sequences(architecture):
    assert spills("outside_sequences.cu", [f"outside_sequences<{kind}>" for kind in tiles.PRECISIONS.values()], architecture) == []


def test_a_spill_is_seen():
    """The check above fails on a kernel that keeps an array in local memory."""
    source = "__global__ void local(int* x) { int y[64]; for (int i = 0; i < 64; ++i) y[x[i] & 63] = i; *x = y[*x & 63]; }"
    log, (mangled,) = compile_program(source, ["local"])
    assert re.search(rf"Function properties for {mangled}\n.*? [1-9]\d* bytes stack frame", log)


def layout_assertions(shift=0):
    """The offset and size of each field, and the size of the whole, of the two structs; `shift` moves one of them."""
    for struct, layout in (("Array", launch.VIEW), ("Factors", launch.FACTORS), ("Problem", launch.LAYOUT)):
        for name in layout.names:
            dtype, offset = layout.fields[name][:2]
            if (struct, name) == ("Problem", "heads"):
                offset += shift
            yield f"__INTADDR__(&((({struct}*)0)->{name})) == {offset}"  # the front end's offsetof; NVRTC 13.0 does not know the builtin
            yield f"sizeof({struct}::{name}) == {dtype.itemsize}"
        yield f"sizeof({struct}) == {layout.itemsize}"


def program_of_assertions(header, conditions):
    return f'#include "{header}"\n' + "".join(f'static_assert({condition}, "");\n' for condition in conditions)


def test_layout_of_the_argument():
    compile_program(program_of_assertions("problem.cuh", layout_assertions()))
    compile_program(program_of_assertions("problem.cuh", [f"BATCH_DIMS == {launch.BATCH_DIMS}"]))


def test_a_wrong_layout_is_seen():
    with pytest.raises(AssertionError, match=r"static assertion failed|static_assert"):
        compile_program(program_of_assertions("problem.cuh", layout_assertions(shift=4)))


def tile_template(tile):
    """The C++ struct of a tile and the parameters of it that follow the precision and the head dims."""
    return {
        tiles.ForwardTile: ("ForwardTiles", ("warps", "row_tiles", "key_tile", "stages", "value_groups")),
        tiles.BackwardTile: ("BackwardTiles", ("warps", "row_tiles", "column_groups", "query_tile", "stages", "score_tiles")),
        tiles.BackwardQueryTile: ("BackwardQueryTiles", ("warps", "row_tiles", "key_tile", "stages", "column_groups")),
        tiles.BackwardBiasTile: ("BackwardBiasTiles", ("warps", "row_tiles", "key_tile")),
    }[tile]


@pytest.mark.parametrize("table", ["FORWARD", "BACKWARD", "BACKWARD_QUERY", "BACKWARD_BIAS"])
def test_sizes_of_tiles(table):
    """Shared memory, threads and tile sizes of every tile of the table, as the kernels have them."""
    conditions, file = set(), None
    for tile, precision, dims in tiles.instances():
        if tile not in tiles.row(getattr(tiles, table), precision, dims):
            continue
        file = tile.file
        struct, parameters = tile_template(type(tile))
        options = (0,) if table == "FORWARD" else ()
        arguments = ", ".join(map(str, (tiles.PRECISIONS[precision], *dims, *options, *(getattr(tile, name) for name in parameters))))
        sizes = {"SHARED_BYTES": tile.shared_bytes(dims, tiles.element_bytes(precision)), "THREADS": tile.threads}
        if table == "BACKWARD":
            sizes["KEY_TILE"] = tile.key_tile
        else:
            sizes["QUERY_TILE"] = tile.query_tile
        conditions |= {f"{struct}<{arguments}>::{name} == {value}" for name, value in sizes.items()}
    assert len(conditions) > len(tiles.HEAD_DIMS)
    compile_program(program_of_assertions(file, sorted(conditions)))


def test_enums():
    conditions = [f"{name} == {option}" for name, option in zip(tiles.OPTION_NAMES, tiles.OPTIONS, strict=True)]
    conditions += [f"sizeof(ElementOf<{kind}>::type) == {tiles.element_bytes(precision)}" for precision, kind in tiles.PRECISIONS.items()]
    kinds = list(tiles.PRECISIONS.values())
    conditions += [f"{one} != {other}" for one in kinds for other in kinds if one != other]
    compile_program(program_of_assertions("score.cuh", conditions))


def test_every_head_dim_has_kernels():
    for available in (tiles.HEAD_DIMS, tiles.HEAD_DIMS_FLOAT64):
        for head_dim in range(1, 257):
            for value_dim in range(1, 257):
                dims = tiles.head_dims(head_dim, value_dim, available)
                assert head_dim <= dims[0] and value_dim <= dims[1]


def test_every_row_ends_with_a_tile_for_the_smallest_gpu():
    for table in tiles.TABLES:
        for precision in tiles.PRECISIONS:
            for dims in tiles.head_dims_of(precision):
                last = tiles.row(table, precision, dims)[-1]
                assert last.shared_bytes(dims, tiles.element_bytes(precision)) <= SMALLEST_LIMIT, (last, precision, dims)


def test_shared_memory_of_neighbouring_blocks_fits():
    """A tile that is compiled for several blocks on one multiprocessor leaves room for them in the 228 KiB of an H200, of which each block takes 1 KiB more."""
    for tile, precision, dims in tiles.instances():
        needed = tile.blocks_per_sm * (tile.shared_bytes(dims, tiles.element_bytes(precision)) + 1024)
        assert needed <= 228 * 1024, (tile, precision, dims)


def test_tiles_divide_the_padded_rows():
    """Rows are padded to the largest of the tiles that read them, which must be a multiple of the others."""
    for architecture, precision, dims in (choice.values for choice in choices()):
        main, query = (tiles.choose(table, precision, dims, SHARED_LIMITS[architecture]) for table in (tiles.BACKWARD, tiles.BACKWARD_QUERY))
        sizes = (main.query_tile, query.query_tile, launch.ROWS_PER_BLOCK)
        assert all(max(sizes) % size == 0 for size in sizes), (main, query)


@pytest.fixture
def copied_kernels(tmp_path, monkeypatch):
    """A copy of kernels/ that the modules are made from for this test."""
    folder = tmp_path / "kernels"
    shutil.copytree(modules.kernels_folder(), folder)
    monkeypatch.setattr(modules, "kernels_folder", lambda: folder)
    modules._digest.cache_clear()
    yield folder
    modules._digest.cache_clear()


@pytest.mark.parametrize("header", ["score.cuh", "ptx/mma_sm80.cuh", "backward_sm80.cu"])
def test_the_source_changes_with_every_file(copied_kernels, header):
    """CuPy caches by the source text, and does not look into included files."""
    before = modules.source("forward_sm80.cu")
    modules._digest.cache_clear()
    assert modules.source("forward_sm80.cu") == before
    with open(copied_kernels / header, "a") as file:
        file.write("// changed\n")
    modules._digest.cache_clear()
    after = modules.source("forward_sm80.cu")
    assert after != before
    assert '#include "forward_sm80.cu"' in after


@pytest.fixture
def fake_device(monkeypatch):
    """cupy.cuda.Device of a GPU that may not exist."""

    class Device:
        compute_capability = "99"

        def __init__(self, device=None):
            self.id = device

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(cupy.cuda, "Device", Device)


def test_a_kernel_that_does_not_compile_says_what_is_needed(fake_device, monkeypatch):
    class RawModule:
        def __init__(self, **arguments):
            pass

        def get_function(self, name):
            raise cupy.cuda.compiler.CompileException("error: no such architecture", "source", name, (), "nvrtc")

    monkeypatch.setattr(cupy, "RawModule", RawModule)
    with pytest.raises(RuntimeError) as caught:
        modules.kernel("forward_sm80.cu", "no_such_kernel<1>", 0, 0)
    message = str(caught.value)
    assert "no_such_kernel<1> of forward_sm80.cu" in message
    assert f"NVRTC {modules.nvrtc_version()}" in message
    assert "sm_99" in message
    assert re.search(r"needs an NVRTC that .*, 1\d\.\d or newer", message)
    assert "cuflash[cuda12]" in message and "cuflash[cuda13]" in message
    assert "error: no such architecture" in message


def test_a_compilation_is_logged(fake_device, monkeypatch, caplog):
    class Kernel:
        num_regs, local_size_bytes, max_dynamic_shared_size_bytes = 77, 8, 0

    class RawModule:
        def __init__(self, **arguments):
            self.arguments = arguments

        def get_function(self, name):
            assert self.arguments["name_expressions"] == (name,)
            return Kernel()

    monkeypatch.setattr(cupy, "RawModule", RawModule)
    caplog.set_level(logging.INFO, "cuflash")
    kernel = modules.kernel.__wrapped__("forward_sm80.cu", "some_kernel<1>", 99 * 1024, 0)
    assert kernel.max_dynamic_shared_size_bytes == 99 * 1024
    (record,) = caplog.records
    assert re.fullmatch(r"some_kernel<1>: compiled or loaded in \d+\.\d\d s, 77 registers, 8 bytes of local memory", record.getMessage())


@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_warmup_compiles_what_calls_use(family, monkeypatch):
    """The names that warmup compiles are instances of the table."""
    from cuflash import cupy_backend

    class Device:
        id = 0

    compiled = []
    monkeypatch.setattr(cupy.cuda, "Device", Device)
    monkeypatch.setattr(launch, "shared_limit", lambda device: SHARED_LIMITS["sm_90"])
    monkeypatch.setattr(launch, "family", lambda device: (family, ""))
    monkeypatch.setattr(modules, "kernel", lambda file, name, shared_bytes, device: compiled.append((file, name)))
    yielded = [name for name, seconds in cupy_backend.warmup(["bfloat16"], [32])]
    assert yielded == [name for _, name in compiled]
    for file in {file for file, _ in compiled}:
        compile_program(f'#include "{file}"\n', [name for own, name in compiled if own == file], "sm_90a" if file.endswith("_sm90.cu") else "sm_90")
    for direction in ("forward", "backward"):
        assert {file for file, _ in compiled if file.startswith(f"{direction}_sm")} == {f"{direction}_{family}.cu"}
