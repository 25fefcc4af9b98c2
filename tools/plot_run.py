"""Draws the curves of one or more runs: loss, accuracy of the model and the EMA, learning rate, gradient norm, speed.

    python tools/plot_run.py output/RUN                              # writes output/RUN/curves.png
    python tools/plot_run.py output/A output/B -output compare.png   # both runs in the same panels

A run need not have finished. Requires matplotlib.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from errors import ArgumentParser, exit_status  # noqa: E402
from run_folder.curves import draw_curves  # noqa: E402
from run_folder.layout import CURVES  # noqa: E402


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('runs', nargs='+', metavar='RUN', help='run folder')
    parser.add_argument('-output', '--output', metavar='FILE.png',
                        help=f'default: RUN/{CURVES}, or ./{CURVES} for several runs')
    args = parser.parse_args()
    path = args.output or (os.path.join(args.runs[0], CURVES) if len(args.runs) == 1 else CURVES)
    draw_curves(args.runs, path)
    print(path)


if __name__ == '__main__':
    sys.exit(exit_status(main))
