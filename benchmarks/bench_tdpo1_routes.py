"""TDPO1 steps of the embedded model with and without the policy's softmax, interleaved.

    python benchmarks/bench_tdpo1_routes.py

Both runs get the same batches; their losses must agree to 1e-5 or no times are printed.
"""

import argparse
import statistics
import tempfile
import time

from train_command import read_train_config

from fastpref.checkpoint.agreement import Agreement
from fastpref.distributed import World, init_world
from fastpref.train.build import build_run
from fastpref.train.resume.start import find_start
from fastpref.train.run import Run
from fastpref.train.run_folder import run_place
from fastpref.train.step import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE as train.py takes them")
    arguments = parser.parse_args()
    world = init_world()
    with tempfile.TemporaryDirectory() as folder:
        routes = {
            "joint": build(world, folder, "joint", 1, arguments.overrides),
            "values": build(world, folder, "values", 10**9, arguments.overrides),
        }
        seconds = {name: [] for name in routes}
        for step in range(arguments.steps):
            losses = {}
            for name, run in routes.items():
                batches = run.train.step(step, world)
                start = time.perf_counter()
                # step + 1: the first step (0) would compute all metrics in both runs
                names, values, _ = train_step(run, batches, step + 1)
                seconds[name].append(time.perf_counter() - start)
                losses[name] = values[names.index("loss/train")].item()
            assert abs(losses["joint"] - losses["values"]) <= 1e-5, losses
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:>7}: {median * 1e3:.1f} ms a step")
    print(f"  ratio: {medians['values'] / medians['joint']:.3f}")


def build(world: World, folder: str, name: str, kl_metrics_every: int, overrides: list[str]) -> Run:
    config = read_train_config(
        "loss.if_tdpo2=false",
        f"loss.kl_metrics_every={kl_metrics_every}",
        f"run_dir={folder}/{name}",
        *overrides,
    )
    return build_run(config, world, find_start("never", run_place(config), Agreement(world)))


if __name__ == "__main__":
    main()
