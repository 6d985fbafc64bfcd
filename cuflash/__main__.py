"""python -m cuflash demo | info | warmup"""

import argparse
import sys

PRECISIONS = ("float16", "bfloat16", "tf32", "float32", "float64")


def main(arguments=None):
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help()
        return 0
    if chosen.command == "demo":
        from cuflash import demo

        return demo.run(chosen)
    from cuflash import info

    return info.run(chosen) if chosen.command == "info" else info.warmup(chosen)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m cuflash", description="Exact attention for CuPy and NumPy arrays.")
    commands = parser.add_subparsers(dest="command", metavar="command")

    defaults = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    demo = commands.add_parser("demo", help="denoise a real seismogram by exact non-local means, and draw it", **defaults)
    demo.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="where to compute; auto takes the GPU if there is one")
    demo.add_argument("--samples", type=int, help="length of the window around the strongest event (default: all 936,001 on a GPU, 65,536 without)")
    demo.add_argument("--snr", type=float, default=5.0, help="signal-to-noise ratio, in dB, after noise is added")
    demo.add_argument("--patch", type=int, help="samples in a patch (default: 63, or 61 where the norm takes three features: 64 features in all)")
    demo.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the products")
    demo.add_argument("--seed", type=int, default=0, help="of the noise")
    demo.add_argument("--output", default="cuflash-demo.png", help="the plot")

    info = commands.add_parser("info", help="what cuflash found here: GPU, driver, CuPy, NVRTC, kernels")
    info.add_argument("--json", action="store_true", help="as JSON")

    warmup = commands.add_parser("warmup", help="compile kernels into CuPy's cache before they are needed", **defaults)
    warmup.add_argument("--dtype", nargs="+", choices=PRECISIONS, default=["float16", "bfloat16", "float32"], help="dtypes")
    warmup.add_argument("--head-dim", nargs="+", type=_head_dim, default=[64, 128], help="head dims, 1 to 256")
    return parser


def _head_dim(text):
    value = int(text)
    if not 1 <= value <= 256:
        raise argparse.ArgumentTypeError(f"{value} is not from 1 to 256")
    return value


if __name__ == "__main__":
    sys.exit(main())
