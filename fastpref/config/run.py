"""The configuration of a run: every option's type, default, unit, meaning and check.

`python train.py --help` is made from these classes. They are plain dataclasses that OmegaConf
composes (no Literal, not frozen); nothing here imports torch, so that a wrong option is refused
before anything heavy is loaded.
"""

from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from omegaconf import OmegaConf

from fastpref.checks import (
    check_choice,
    check_not_empty,
    check_number,
    expand_home,
    take_other_name,
)
from fastpref.config.adapter import AdapterConfig
from fastpref.config.data import SPLITS, DataConfig
from fastpref.config.groups import (
    HeadConfig,
    ModelConfig,
    OptimConfig,
    PackingConfig,
    WeightsConfig,
)
from fastpref.config.loss import LossConfig, TransformConfig
from fastpref.config.plan import PlanConfig
from fastpref.config.reference import ReferenceConfig
from fastpref.config.stages import StagesConfig
from fastpref.config.survival import CheckpointConfig, ParallelConfig, ResumeConfig
from fastpref.config.trackers import TensorboardConfig, TrackerOptions, WandbConfig
from fastpref.errors import ConfigError

TASKS = ("train", "audit", "plan", "estimate_weights", "tisdpo")
TRAINERS = ("BasicTrainer", "FSDPTrainer")


class TrainingOptions(NamedTuple):
    """Options that determine the models and the memory of a training."""

    model: ModelConfig
    adapter: AdapterConfig
    loss: LossConfig
    optimizer: str
    optim: OptimConfig
    activation_checkpointing: bool
    compile: str
    seed: int
    batch_size: int
    """Rows of an optimizer step."""
    caches_reference: bool
    """Whether the reference's log-probabilities are computed before the first step."""

    @property
    def has_reference(self) -> bool:
        """Whether a reference computes in every step."""
        return self.loss.needs.reference and not self.caches_reference


@dataclass(kw_only=True)
class Config:
    """One run. Sizes called `batch` count examples: pairs, or sequences for loss=sft."""

    task: str = "train"
    """train; audit: check the data and write a page that shows it; plan: the memory that training
    takes, also on GPUs that are not here; estimate_weights: TIS-DPO's second step; tisdpo: all of
    its steps, one after the other."""
    seed: int = 0
    """Seeds torch, numpy, random, the order of the data and which prompts are held out, >= 0."""

    exp_name: str | None = None
    """First part of the run folder's name; null: made from loss, model and datasets."""
    output_dir: str = "output"
    """Folder in which run folders are made."""
    run_dir: str | None = None
    """The run folder itself; null: <output_dir>/<exp_name>_<timestamp>."""
    local_run_dir: str | None = None
    """Another name of run_dir."""
    local_dirs: list[str] | None = None
    """Instead of output_dir: <dir>/<user>, where <dir> is the first of these that exists, else the
    last."""
    debug: bool = False
    """A trial run: neither wandb nor tensorboard follows it."""

    datasets: list[str] = field(default_factory=lambda: ["hh"])
    """Data to mix: planted (embedded), hh, shp, se (hub), folders of base_data_dir, or datasets of
    the hub, org/name."""
    base_data_dir: str | None = None
    """Holds folders {name}/ with the splits train and test: {split}.jsonl, .ndjson, .parquet,
    .json, .arrow, .csv or .tsv, text formats also .gz, .bz2, .xz or .zst, or shards or a folder
    {split}/ of them; also in a subfolder data/, as on the hub. Folders of save_to_disk work too.
    Without a test split see data.test_fraction."""
    reverse_dataset: bool = False
    """Swap chosen and rejected, token weights included."""
    max_length: int = 512
    """Largest length of prompt + response, tokens."""
    max_prompt_length: int = 256
    """Length to which a prompt is cut if prompt + response is too long, tokens, < max_length."""
    n_epochs: int | None = 1
    """Passes over the data, or with data.shares epochs; null: no limit but n_examples."""
    n_examples: int | None = None
    """Examples to train on, rounded up to whole batches; null: no limit but n_epochs. Training ends
    at whichever comes first."""

    batch_size: int = 4
    """Examples per optimizer step, over all processes and accumulation steps. It need not be a
    multiple of them."""
    gradient_accumulation_steps: int = 1
    """Least number of micro-batches per optimizer step, as far as there are rows for them, if
    packing.max_tokens is a number; no effect if that is auto. The update is the same for any."""
    lr: float = 5e-7
    """Learning rate after warm-up, > 0."""
    warmup_steps: int = 150
    """Optimizer steps of linear warm-up, >= 0."""
    max_grad_norm: float = 10.0
    """Gradients are clipped to this norm, > 0."""
    on_nonfinite: str = "stop"
    """A step whose loss or gradient is not finite is never applied. stop: end with exit code 5,
    naming its rows. skip: leave it out and count it; ten in a row end the run."""
    optimizer: str = "AdamW"
    """A class of torch.optim."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more computation."""

    compile: str = "false"
    """true: compile each block with torch.compile in the first step; packed rows are then padded to
    one of a few lengths. auto: on a GPU, if the run is long enough to pay. Compiled blocks in 16
    bits, or compiled with activation_checkpointing, make policy and reference start equal only up
    to rounding."""

    trainer: str = "BasicTrainer"
    """BasicTrainer (one process) or FSDPTrainer (every visible GPU; or all processes that torchrun,
    srun or mpirun started)."""
    fsdp_port: int | None = None
    """Port on which the processes meet. null: a free one; under srun or mpirun MASTER_PORT, under
    srun by default one derived from the job's id."""

    eval_every: int = 20_000
    """Examples between evaluations, rounded down to whole batches, at least one."""
    eval_batch_size: int = 16
    """Examples evaluated, or prompts sampled, at once, over all processes."""
    n_eval_examples: int = 256
    """Examples of the test split to evaluate on; 0: no evaluation, and no test split needed."""
    do_first_eval: bool = True
    """Evaluate before the first update."""
    sample_during_eval: bool = True
    """Write sampled responses at each evaluation."""
    n_eval_model_samples: int = 16
    """Prompts to sample at each evaluation."""
    minimum_log_interval_secs: float = 1.0
    """Least time between two writes of training steps to metrics.jsonl and the log, seconds. Every
    step still has its line in metrics.jsonl."""

    model: ModelConfig
    """Which model to train: model=NAME is configs/model/NAME.yaml."""
    loss: LossConfig
    """What to minimise: loss=NAME is configs/loss/NAME.yaml."""
    transform: TransformConfig = field(default_factory=TransformConfig)
    """Transform of token weights: transform=NAME is configs/transform/NAME.yaml."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """All weights or adapters: adapter=NAME is configs/adapter/NAME.yaml."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The model that the policy is compared with."""
    packing: PackingConfig = field(default_factory=PackingConfig)
    """How rows are laid out for the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """How rows are read."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Schedule and optimizer arguments."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """The fused LM head."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving the state of a run."""
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    """Resuming a run."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Several processes."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)
    """TensorBoard."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """task=estimate_weights."""
    stages: StagesConfig = field(default_factory=StagesConfig)
    """task=tisdpo."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    """task=plan."""

    def __post_init__(self) -> None:
        check_choice("task", self.task, TASKS)
        expand_home(self, "output_dir", "run_dir", "local_run_dir", "local_dirs", "base_data_dir")
        # a plan may be for another machine, with other packages
        if self.task != "plan":
            self.model.check_installed()
            self.adapter.check_installed()
            self.trackers.check_installed()
        check_choice("on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        self.compile = str(self.compile).lower()
        check_choice("compile", self.compile, ("auto", "true", "false"))
        self._check_trainer()
        self._check_numbers()
        take_other_name(self, "run_dir", "local_run_dir")
        if not self.datasets or not all(self.datasets):
            raise ValueError(f"datasets must name at least one dataset, got {list(self.datasets)}")
        self.data.check_datasets(self.datasets)
        self.reference.check_loss(self.loss)
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length must be < max_length ({self.max_length}), "
                f"got {self.max_prompt_length}"
            )
        if self.n_epochs is None and self.n_examples is None:
            raise ValueError("n_epochs and n_examples are both null: give at least one of them")
        # stages of task=tisdpo have losses of their own, and are checked as runs of task=train
        if self.task == "train":
            loss = self.loss
            self.checkpoint.check_best(self.n_eval_examples, loss.name, loss.held_out_names)
        # the full check needs torch; a path or a call is refused here
        if not self.optimizer.isidentifier():
            raise ValueError(
                f"optimizer must be the name of a class in torch.optim, got {self.optimizer!r}"
            )
        self.resume.check_task(self.task)
        if self.task in ("estimate_weights", "tisdpo"):
            self.weights.check_names(self.datasets)
        if self.task == "estimate_weights":
            self.weights.check_task(self.base_data_dir)
        if self.task == "tisdpo":
            self.stages.check_task(
                self.loss.name, self.weights.positive_template, self.weights.negative_template
            )
        check_not_empty(self)

    def _check_trainer(self) -> None:
        if self.trainer == "TensorParallelTrainer":
            raise ValueError(
                "trainer=TensorParallelTrainer does not exist here; trainer=FSDPTrainer shards the "
                "model over the same GPUs"
            )
        check_choice("trainer", self.trainer, TRAINERS)

    def _check_numbers(self) -> None:
        for name in (
            "batch_size",
            "eval_batch_size",
            "gradient_accumulation_steps",
            "n_epochs",
            "n_examples",
            "n_eval_model_samples",
            "eval_every",
            "max_prompt_length",
            "max_length",
        ):
            check_number(name, getattr(self, name), ge=1)
        check_number("n_eval_examples", self.n_eval_examples, ge=0)
        # numpy takes 32-bit seeds
        check_number("seed", self.seed, ge=0, lt=2**32)
        check_number("lr", self.lr, gt=0)
        check_number("max_grad_norm", self.max_grad_norm, gt=0)
        check_number("warmup_steps", self.warmup_steps, ge=0)
        check_number("minimum_log_interval_secs", self.minimum_log_interval_secs, ge=0)
        check_number("fsdp_port", self.fsdp_port, ge=1, le=65535)

    @property
    def training(self) -> TrainingOptions:
        """The options that determine the models and the memory of a training."""
        return TrainingOptions(
            model=self.model,
            adapter=self.adapter,
            loss=self.loss,
            optimizer=self.optimizer,
            optim=self.optim,
            activation_checkpointing=self.activation_checkpointing,
            compile=self.compile,
            seed=self.seed,
            batch_size=self.batch_size,
            caches_reference=self.caches_reference,
        )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that training reads."""
        return SPLITS if self.n_eval_examples else SPLITS[:1]

    @property
    def caches_reference(self) -> bool:
        """Whether the reference is scored before the first step: `ReferenceConfig.is_cached`."""
        return self.reference.is_cached(self.loss, self.n_epochs)

    @property
    def trackers(self) -> TrackerOptions:
        """Options of the trackers."""
        return TrackerOptions(self.wandb, self.tensorboard, self.debug)

    def check_device(self, device_type: str, has_bfloat16: bool) -> None:
        """Refuse options that the device does not support; without torch, the caller describes it.

        Args:
            device_type: "cpu", "cuda", ….
            has_bfloat16: Whether the device computes in bfloat16.

        Raises:
            ConfigError: naming the option and a value that works.
        """
        asked = self.model.needing_cuda()
        if asked and device_type != "cuda":
            raise ConfigError(
                f"{asked[0]} needs a CUDA device, this one is {device_type}; set {asked[1]}"
            )
        if self.adapter.quantized and device_type != "cuda":
            raise ConfigError(
                f"adapter=qlora computes on a CUDA device, this one is {device_type}; choose "
                "adapter=lora"
            )
        dtypes = (self.model.policy_dtype, self.model.compute_dtype)
        if "bfloat16" in dtypes and not has_bfloat16:
            raise ConfigError(
                f"this {device_type} device does not compute in bfloat16; set "
                "model.policy_dtype=float32 model.fsdp_policy_mp=null"
            )

    def computed_exp_name(self) -> str:
        """The run's name if exp_name is null, by the rule of the TIS-DPO repository.

        LOSS_MODEL_DATASETS with the last part of the model's path, then `_reverse` for a reversed
        dpo run and the transform with its parameters for tisdpo.
        """
        model = PurePosixPath(self.model.name_or_path).name
        datasets = "_".join(self.datasets).replace("/", "-")
        name = f"{self.loss.name}_{model}_{datasets}"
        if self.loss.name == "dpo" and self.reverse_dataset:
            return f"{name}_reverse"
        if self.loss.name == "tisdpo":
            return f"{name}_{self.transform.label()}"
        return name

    def to_yaml(self) -> str:
        """Every option with its value, as `config.yaml` of the run folder holds it."""
        # plain values take half the time of a schema
        return OmegaConf.to_yaml(OmegaConf.create(asdict(self)))
