"""From a checked config to an exit code: logging, launch, task, and one message per user error."""

import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastpref.config import Config, check_device
from fastpref.errors import ConfigError, DistributedError, first_line, say_error

if TYPE_CHECKING:
    from fastpref.distributed import World

logger = logging.getLogger("fastpref")


def main(config: Config) -> int:
    """Run the config's task.

    Returns:
        0, or the exit code of a `FastprefError`, whose message went to stderr. A bug raises, and
        so does a signal where nothing remembers it.
    """
    configure_logging(is_main=os.environ.get("RANK", "0") == "0")
    from fastpref.explanations import explain

    try:
        return dispatch(config)
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        say_error(known)
        return known.exit_code


def dispatch(config: Config) -> int:
    """Check what depends on the machine, join the other ranks, and do the task."""
    import torch
    import torch.distributed as dist
    from fastpref_kernels import set_workspace_mib

    from fastpref.distributed import init_world, launched, world_size
    from fastpref.train.advice import advise_task
    from fastpref.train.optim import check_optimizer
    from fastpref.train.run_folder import check_run_root, check_writable

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    asked_for = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if device_type == "cpu" and asked_for not in ("", "-1"):
        logger.warning(
            "CUDA_VISIBLE_DEVICES=%s: torch sees no GPU there, taking the CPU", asked_for
        )
    # torch computes bfloat16 on any CPU
    has_bfloat16 = device_type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    check_device(config, device_type, has_bfloat16=has_bfloat16)
    set_workspace_mib(config.head.workspace_mib)
    if config.task == "audit":
        audit(config)
        return 0
    for line in advise_task(config, needs_weights=config.loss.needs.weights):
        logger.warning(line)
    num_gpus = torch.cuda.device_count()
    on_every_gpu = config.trainer == "FSDPTrainer" and not launched() and num_gpus > 1
    num_ranks = num_gpus if on_every_gpu else world_size()
    if config.task in ("train", "tisdpo"):
        if config.task == "train":
            check_run_root(config)
        else:
            from fastpref.tisdpo.recipe import check_run_folder

            check_run_folder(config)
        check_optimizer(config.optimizer, config.optim.arguments(), num_ranks)
    else:
        assert config.weights.output_dir
        check_writable("weights.output_dir", Path(config.weights.output_dir))
    if on_every_gpu:
        return launch_on_every_gpu(config, num_gpus)
    world = init_world()
    try:
        run_task(config, world)
        # no rank leaves, and takes the others' store along, before all are done
        world.agree_max(0)
    finally:
        dist.destroy_process_group()
    return 0


def run_task(config: Config, world: "World") -> None:
    """`task=train`, `estimate_weights` or `tisdpo`, on this rank."""
    if config.task == "estimate_weights":
        from fastpref.tisdpo.estimate import estimate_weights

        estimate_weights(config, world)
        return
    from fastpref.train.trackers import check_trackers

    world.on_main(lambda: check_trackers(config))
    if config.task == "tisdpo":
        from fastpref.tisdpo.recipe import run_tisdpo

        run_tisdpo(config, world)
    else:
        from fastpref.train.loop import train

        train(config, world)


def audit(config: Config) -> None:
    """`task=audit`: what training would say of the data, without a model's weights."""
    from fastpref.data.audit import run_audit
    from fastpref.data.options import data_options
    from fastpref.data.source import SPLITS, check_sources, read_rows
    from fastpref.model.paths import resolve_model
    from fastpref.model.source import load_model_tokenizer, read_vocab_size

    options = data_options(config)
    check_sources(options)
    for split in SPLITS:
        read_rows(options, split, quiet=False)
    name = resolve_model(config.model.name_or_path)
    vocab_size = read_vocab_size(name, config.model.revision)
    run_audit(options, load_model_tokenizer(config.model), vocab_size=vocab_size)


def launch_on_every_gpu(config: Config, num_gpus: int) -> int:
    """Run this same command under torchrun, one process a GPU.

    Returns:
        The exit code of the first rank that failed, or 0.

    Raises:
        ConfigError: the port is taken.
        DistributedError: the processes do not find each other.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if config.fsdp_port is not None:
        check_port(config.fsdp_port)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_gpus,
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{config.fsdp_port or 0}",
        run_id="fastpref",
        max_restarts=0,
    )
    try:
        elastic_launch(launch, sys.executable)("-u", *sys.argv)
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else DistributedError.exit_code
    except SignalException as stopped:
        # the ranks got the signal too; torchrun gives them 30 s to save
        return 130 if stopped.sigval == signal.SIGINT else 75
    except RendezvousError as error:
        raise DistributedError(f"the processes do not meet: {first_line(error)}") from None
    return 0


def check_port(port: int) -> None:
    """Refuse a port that another program listens on: torchrun would wait for it for minutes.

    Raises:
        ConfigError: naming the port.
    """
    with socket.socket() as probe:
        # as torch does: a port of a connection that has just ended can be had
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"fsdp_port={port} cannot be had: {error.strerror}; name another one, or null for "
                "a free one"
            ) from None


def configure_logging(*, is_main: bool) -> None:
    """Our own messages to stderr, rank 0 only; libraries keep their warnings to themselves."""
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    logger.propagate = False
    if not (is_main and sys.stderr.isatty()):
        # read by huggingface_hub and transformers when they are imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class StderrHandler(logging.StreamHandler):
    """Writes to the stderr of the moment: a progress bar puts its own in place while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)
