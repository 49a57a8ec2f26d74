"""The rules of the configuration, and what the command line makes of KEY=VALUE arguments."""

import re
import time
from itertools import pairwise

import pytest
from omegaconf import OmegaConf

import train
from fastpref import deadline
from fastpref.checks import nearest
from fastpref.cli.options import CHOICE_GROUPS, all_options, format_help, list_choices
from fastpref.cli.overrides import build_config, read_config
from fastpref.config import (
    LOSSES,
    METHODS,
    CheckpointConfig,
    Config,
    DPOConfig,
    ModelConfig,
    PackingConfig,
    TDPOConfig,
    TensorboardConfig,
    TISDPOConfig,
    TransformConfig,
    WandbConfig,
)
from fastpref.config.loss import LOSS_BOUNDS
from fastpref.errors import ConfigError
from fastpref.token_weights import transform_weights


def read(*arguments: str) -> Config:
    return read_config(list(arguments), train.compose_choices, train.CONFIG_DIR)


def tiny_config(**values) -> Config:
    return Config(**{"model": ModelConfig(name_or_path="tiny"), "loss": TDPOConfig()} | values)


def test_default_run_is_tdpo2_of_the_embedded_model_on_the_embedded_data():
    config = read()
    assert (config.model.name_or_path, config.datasets) == ("tiny", ["planted"])
    assert isinstance(config.loss, TDPOConfig) and config.loss.if_tdpo2


def test_another_model_inherits_nothing_from_tiny():
    qwen = ModelConfig(name_or_path="exlaw/Qwen2.5-3B-sft")
    assert read("model=qwen", "loss=dpo") == Config(model=qwen, loss=DPOConfig())


def test_learning_rate_comes_from_base_then_loss_then_model_then_command_line():
    assert read("model=qwen", "loss=dpo").lr == 5e-7
    assert read("model=qwen", "loss=tdpo").lr == 5e-6
    assert read("model=tiny", "loss=tdpo").lr == read("model=tiny", "loss=sft").lr
    assert read("lr=3e-4", "loss=tdpo", "model=tiny").lr == 3e-4


@pytest.mark.parametrize("model", list_choices(train.CONFIG_DIR, "model"))
def test_every_model_file_names_a_model_that_anyone_can_fetch(model):
    blank = ["model.name_or_path=gpt2-xl"] if model == "blank_model" else []
    name = read(f"model={model}", *blank).model.name_or_path
    assert re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_composes_to_its_schema(loss):
    assert type(read(f"loss={loss}").loss) is LOSSES[loss]


def test_every_number_of_a_loss_has_bounds_that_are_checked_before_a_model_is_loaded():
    numbers = {key for key, option in all_options().items() if option.type in (int, float)}
    of_losses = {key.removeprefix("loss.") for key in numbers if key.startswith("loss.")}
    assert of_losses == set(LOSS_BOUNDS), "LOSS_BOUNDS of config/loss.py has an entry for each"


def test_a_loss_of_a_loss_is_refused_where_it_is_written():
    with pytest.raises(TypeError, match="RobustConfig must derive from LossConfig alone"):
        type("RobustConfig", (DPOConfig,), {"name": "robust"})
    assert DPOConfig().name == "dpo" and "robust" not in LOSSES


@pytest.mark.parametrize(
    ("preset", "method", "params"),
    [
        ("default", "binary", {"top_percent": 100.0}),
        ("paper", "paper", {"k": 1.0, "L": -0.5, "U": 1.5}),
        (
            "aggressive",
            "threshold_and_scale",
            {"min_val": -2.0, "max_val": 2.0, "min_scale": 0.5, "max_scale": 1.5},
        ),
        (
            "named_params",
            "threshold_and_scale",
            {"min_val": -1.8, "max_val": 1.8, "min_scale": 0.6, "max_scale": 1.4},
        ),
    ],
)
def test_transform_presets_have_the_seed_values(preset, method, params):
    transform = read(f"transform={preset}").transform
    assert (transform.method, transform.params()) == (method, params)


@pytest.mark.parametrize("method", METHODS)
def test_every_transform_takes_the_parameters_of_its_block(method):
    params = TransformConfig(method=method).params()
    assert len(transform_weights([0.3, -1.0, 2.0], method, **params)) == 3


@pytest.mark.parametrize(("method", "label"), [("binary", "binary50"), ("rank_based", "")])
def test_ties_reach_the_transform_and_the_name_of_the_run(method, label):
    options = ["loss=tisdpo", f"transform.method={method}", "transform.binary.top_percent=50"]
    plain, equal = read(*options), read(*options, f"transform.{method}.ties=equal")
    assert "ties" not in plain.transform.params()
    assert equal.transform.params() == plain.transform.params() | {"ties": "equal"}
    assert plain.computed_exp_name().endswith(label)
    assert equal.computed_exp_name() == f"{plain.computed_exp_name()}_ties"


def test_printed_options_compose_to_the_same_config():
    config = read("loss=tisdpo", "optim.betas=[0.9,0.95]", "transform.binary.top_percent=50")
    printed = OmegaConf.create(config.to_yaml())
    again = build_config(OmegaConf.merge(train.compose_choices(["loss=tisdpo"]), printed))
    assert again == config


def test_last_value_of_a_key_wins_and_plus_signs_change_nothing():
    config = read("lr=1", "batch_size=8", "++lr=2", "+batch_size=16", "loss=sft", "loss=dpo")
    assert (config.lr, config.batch_size, config.loss.name) == (2.0, 16, "dpo")


def test_the_last_value_wins_whatever_forms_its_option_was_given_in():
    config = read("resume=/a", "resume.path=never", "resume=/b")
    assert config.resume.path == "/b"
    forms = ("data.columns={prompt: a}", "data.columns.prompt=b", "data.columns={prompt: c}")
    config = read("datasets=[x]", *forms)
    assert config.data.columns == {"prompt": "c"}


def test_text_options_take_text_as_it_stands():
    config = read("run_dir=/tmp/a=b (1), c", "exp_name=2024_01", "model.archive='x y'")
    assert config.run_dir == "/tmp/a=b (1), c"
    assert config.exp_name == "2024_01"
    assert config.model.archive == "x y"


PATHS = ("model.name_or_path", "model.tokenizer_name_or_path", "model.archive", "output_dir")
PATHS += ("run_dir", "base_data_dir", "data.chat_template", "data.cache_dir", "resume.path")
PATHS += ("reference.cache_dir", "weights.positive", "weights.negative", "weights.output_dir")


@pytest.mark.parametrize("tracker", [WandbConfig, TensorboardConfig])
def test_a_tracker_is_to_be_installed_where_it_would_follow_the_run(monkeypatch, tracker):
    monkeypatch.setattr("fastpref.config.trackers.find_spec", lambda name: None)
    name = tracker.__name__.removesuffix("Config").lower()
    options = {name: tracker(enabled=True)}
    with pytest.raises(ValueError, match=f"{name}.enabled=true needs the package {name}"):
        tiny_config(**options)
    for followed_by_none in ({"debug": True}, {"task": "plan"}):
        assert tiny_config(**options, **followed_by_none)


def test_every_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    others = ["local_dirs=[~/a,/b]", "exp_name=~/x", "loss=dpo", "model=blank_model"]
    config = read(*(f"{key}=~/x" for key in PATHS), *others)
    assert config.local_dirs == ["/home/me/a", "/b"] and config.exp_name == "~/x"
    assert {OmegaConf.select(OmegaConf.structured(config), key) for key in PATHS} == {"/home/me/x"}
    assert read("local_run_dir=~/x").run_dir == "/home/me/x"


def test_mappings_are_yaml_and_may_be_given_entry_by_entry():
    columns = {"prompt": "a b", "chosen": "c", "rejected": None}
    assert read("data.columns={prompt: a b, chosen: c, rejected: null}").data.columns == columns
    assert read("data.columns={prompt:a b,chosen:c,rejected:null}").data.columns == columns
    by_entry = [f"data.columns.{key}={value or 'null'}" for key, value in columns.items()]
    assert read(*by_entry).data.columns == columns
    config = read("data.template_kwargs={thinking: false, date: 2026-11-30, places: [{n: 1.5}]}")
    arguments = {"thinking": False, "date": "2026-11-30", "places": [{"n": 1.5}]}
    assert config.data.template_kwargs == arguments


def test_a_colon_without_a_space_gives_the_same_values_as_one_with_it():
    config = read(
        "data.template_kwargs={thinking:false,n:1,at:http://a,text:'1',in:{x:1.5,y:null}}"
    )
    assert config.data.template_kwargs == {
        "thinking": False,
        "n": 1,
        "at": "http://a",
        "text": "1",
        "in": {"x": 1.5, "y": None},
    }


def test_lists_and_null():
    config = read("datasets=[hh, 'shp']", "local_dirs=[/scr]", "n_epochs=null", "n_examples=10")
    assert (config.datasets, config.local_dirs) == (["hh", "shp"], ["/scr"])
    assert (config.n_epochs, config.n_examples) == (None, 10)
    assert read("recipe=null") == read()
    config = read("datasets=['a,b']", """local_dirs=[/x, "/a b,c" ,'d,',/it's,"e" f]""")
    assert config.datasets == ["a,b"]
    assert config.local_dirs == ["/x", "/a b,c", "d,", "/it's", '"e" f']


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("loss.beta=-1", "loss.beta must be > 0, got -1.0"),
        ("lr=0", "lr must be > 0, got 0.0"),
        ("lr=-1e-6", "lr must be > 0"),
        ("lr=nan", "lr must be > 0 and finite, got nan"),
        ("lr=inf", "lr must be > 0 and finite, got inf"),
        ("max_grad_norm=-1", "max_grad_norm must be > 0"),
        ("max_grad_norm=0", "max_grad_norm must be > 0"),
        ("fsdp_port=0", "fsdp_port must be >= 1 and <= 65535, got 0"),
        ("fsdp_port=65536", "fsdp_port must be >= 1 and <= 65535, got 65536"),
        ("minimum_log_interval_secs=-1", "minimum_log_interval_secs must be >= 0"),
        ("n_eval_examples=-1", "n_eval_examples must be >= 0"),
        ("compile=yes", "compile must be one of auto, true, false, got 'yes'"),
        ("loss.alpha=-0.1", "loss.alpha must be >= 0"),
        ("warmup_steps=-1", "warmup_steps must be >= 0"),
        ("batch_size=0", "batch_size must be >= 1"),
        ("max_length=0", "max_length must be >= 1"),
        # too large for a float
        (f"seed={'9' * 400}", "seed must be >= 0 and < 4294967296, got 999"),
        (f"packing.max_tokens=-{'9' * 400}", "packing.max_tokens must be >= 1, got -999"),
        (f"checkpoint.deadline={'9' * 400}:00:00", "deadline in hours must be <= 8784"),
        ("max_prompt_length=9999", r"max_prompt_length must be < max_length \(\d+\), got 9999"),
        ("seed=-1", r"seed must be >= 0"),
        ("seed=4294967296", r"seed must be >= 0 and < 4294967296, got 4294967296"),
        ("max_prompt_length=128", r"max_prompt_length must be < max_length \(128\), got 128"),
        ("n_epochs=null", "n_epochs and n_examples are both null"),
        ("datasets=[]", "datasets must name at least one"),
        ("datasets=[a,'']", "datasets must name at least one"),
        ("reference.mode=cache", "KL of loss=tdpo needs those of every word"),
        ("task=trian", "task must be one of .*nearest: train"),
        ("trainer=FSDP", "trainer must be one of .*nearest: FSDPTrainer"),
        ("trainer=TensorParallelTrainer", "trainer=FSDPTrainer shards"),
        ("optimizer=torch.optim.Adam", "optimizer must be the name of a class in torch.optim"),
        ("transform.method=rank", "transform.method must be one of .*nearest: rank_based"),
        ("model.archive=", "model.archive must name a folder or a file, or be null, got ''"),
        ("run_dir=", "run_dir must be a non-empty text or null, got ''"),
        ("output_dir=", "output_dir must be a non-empty text, got ''"),
        ("local_dirs=['']", r"list of non-empty texts or null, got \[''\]"),
        ("model.tokenizer_name_or_path=", "model.tokenizer_name_or_path must be a non-empty"),
        ("data.chat_template=", "data.chat_template must be a non-empty text or null, got ''"),
        ("model.policy_dtype=bf16", "one of float32, bfloat16, float16, got 'bf16'"),
        ("model.attention=flash_attention_2", "computes in bfloat16 .* model.attention=sdpa"),
        ("data.on_error=skp", "data.on_error must be one of raise, skip.*nearest: skip"),
        ("data.max_dropped=1.5", "data.max_dropped must be >= 0 and <= 1, got 1.5"),
        ("data.eos_weight=nan", "data.eos_weight must be finite"),
        # words that a step does not have would be 0 / 0
        ("optim.eps=0", "optim.eps must be > 0, got 0.0"),
        ("optim.eps=1e-39", "optim.eps must be >= 1.17549e-38, got 1e-39"),
        ("optim.schedule=cosin", "optim.schedule must be one of .*nearest: cosine"),
        ("optim.betas=[0.9]", "optim.betas must be two numbers"),
        ("optim.betas=[0.9,1]", "optim.betas must be >= 0 and < 1"),
        ("packing.max_tokens=0", "packing.max_tokens must be >= 1, got 0"),
        ("packing.share_prompt=maybe", "share_prompt must be one of auto, true, false, got 'maybe"),
        ("head.workspace_mib=0", "head.workspace_mib must be >= 1"),
        (
            "head.workspace_mib=8796093022208",
            "workspace_mib must be >= 1 and <= 4398046511104",
        ),
        ("transform.binary.top_percent=0", "top_percent must be > 0 and <= 100"),
        ("transform.binary.ties=equl", "binary.ties must be one of .*nearest: equal"),
        ("transform.rank_based.ties=sed", "rank_based.ties must be one of .*nearest: seed"),
        ("transform.threshold.upper_threshold=-1", "lower_threshold must be < transform.thresh"),
        ("transform.threshold_and_scale.max_val=-1.5", "scale.min_val must be < transform.thres"),
        ("transform.threshold_and_scale.min_scale=2", "min_scale must be < transform.threshold_"),
        ("transform.rank_based.max_scale=0.7", "rank_based.min_scale must be < transform.rank_"),
        ("transform.paper.U=inf", "transform.paper.U must be finite, got inf"),
        ("transform.paper.k=0", "transform.paper.k must be > 0, got 0.0"),
        ("transform.paper.U=-0.5", "transform.paper.L must be < transform.paper.U"),
        ("transform.random.max_val=0.1", "random.min_val must be < transform.random.max_val"),
        ("task=estimate_weights", "weights.positive is required by task=estimate_weights"),
        ("loss.name=dpo", "choose the loss by loss=NAME"),
        ("checkpoint.every=-1", "checkpoint.every must be >= 0"),
        ("checkpoint.keep=0", "checkpoint.keep must be >= 1"),
        ("checkpoint.mode=asyn", "checkpoint.mode must be one of .*nearest: async"),
        ("checkpoint.deadline=90", "checkpoint.deadline must be HH:MM:SS, got '90'"),
        ("checkpoint.deadline=1:60:00", "checkpoint.deadline must be HH:MM:SS"),
        ("checkpoint.deadline=1:00:00h", "checkpoint.deadline must be HH:MM:SS"),
        ("checkpoint.deadline=9999999999:00:00", "checkpoint.deadline in hours must be <= 8784,"),
        ("checkpoint.keep_best=margins", "must name a held-out metric, such as loss/eval"),
        ("parallel.timeout=0", "parallel.timeout must be >= 1"),
        ("parallel.timeout=99999999999", "parallel.timeout must be >= 1 and <= 31622400,"),
        ("plan.num_gpus=0", "plan.num_gpus must be >= 1, got 0"),
        ("plan.memory_gib=0", "plan.memory_gib must be > 0"),
        ("plan.memory_gib=1000001", "plan.memory_gib must be <= "),
        ("stages.sft_n_epochs=0", "stages.sft_n_epochs must be >= 1, got 0"),
        ("stages.contrast_beta=0", "stages.contrast_beta must be > 0"),
        ("on_nonfinite=ignore", "on_nonfinite must be one of stop, skip"),
        ("resume=", "resume.path must be never, auto or a path"),
        ("data.columns={promt: q}", "data.columns: there is no field promt, .*nearest: prompt"),
        ("data.columns={good: chosen}", "no field good, .* it is written {FIELD: COLUMN}"),
        ("data.columns={prompt: a, chosen: a}", "data.columns: prompt and chosen are both 'a'"),
        ("data.columns={prompt: ''}", "data.columns.prompt must name a column, or be null, got ''"),
        ("data.columns={prompt: [a]}", r"data.columns.prompt must name a column, .* got \['a'\]"),
        ("data.split_names={tran: a}", "data.split_names must be one of train, test.*: train"),
        ("data.split_names={train: a/b}", "data.split_names.train must be the name of a split"),
        ("data.config_names={hh: a}", "data.config_names must be one of planted"),
        ("data.config_names={planted: ''}", "data.config_names.planted must name a configuration"),
        ("data.template_kwargs={tokenize: true}", "template_kwargs.tokenize: the rows, the token"),
        ("data.template_kwargs={messages: []}", "the program itself give messages"),
        ("data.template_kwargs={a b: 1}", "'a b' is no name of an argument"),
        ("data.template_kwargs={a: .inf}", "data.template_kwargs.a must be text, a number, true"),
    ],
)
def test_values_out_of_range_are_refused_with_the_rule(argument, message):
    with pytest.raises(ConfigError, match=message):
        read(argument)


def test_labels_that_are_wrong_as_often_as_right_are_refused():
    with pytest.raises(ConfigError, match=r"label_smoothing must be >= 0 and < 0\.5, got 0\.5"):
        read("loss=dpo", "loss.label_smoothing=0.5")


def test_what_is_counted_from_one_is_refused_at_zero():
    names = ("batch_size", "eval_batch_size", "gradient_accumulation_steps", "n_epochs")
    names += ("n_examples", "n_eval_model_samples", "eval_every", "max_prompt_length", "max_length")
    for name in names:
        with pytest.raises(ValueError, match=f"^{name} must be >= 1, got 0"):
            tiny_config(**{name: 0})


def test_the_bounds_themselves_are_in_range():
    arguments = [
        *("batch_size=1", "eval_batch_size=1", "n_epochs=1", "n_examples=1", "eval_every=1"),
        *("gradient_accumulation_steps=1", "n_eval_examples=0", "warmup_steps=0", "fsdp_port=1"),
        *("minimum_log_interval_secs=0", "seed=4294967295", "checkpoint.every=0"),
        *("checkpoint.keep=1", "checkpoint.deadline=8784:00:00", "parallel.timeout=1"),
        *("packing.max_tokens=1", "head.workspace_mib=1", "model.router_aux_loss=0"),
        *("optim.min_lr_ratio=1", "optim.weight_decay=0", "optim.momentum=0"),
        *("optim.betas=[0,0]", "optim.eps=1.1754943508222875e-38", "weights.batch_size=1"),
        *("weights.shard_rows=1", "weights.round=0", "data.max_dropped=1", "data.num_proc=1"),
        *("data.test_fraction=0", "plan.num_gpus=1", "plan.memory_gib=1000000"),
        *("stages.sft_n_epochs=1", "stages.contrast_n_epochs=1", "adapter=lora", "adapter.r=1"),
        *("adapter.dropout=0", "transform.binary.top_percent=100", "loss.alpha=0"),
    ]
    assert read("loss=simpo", "loss.gamma=0").loss.name == "simpo"
    config = read(*arguments)
    assert (config.seed, config.adapter.r, config.optim.min_lr_ratio) == (2**32 - 1, 1, 1.0)
    highest = read(
        "fsdp_port=65535", "parallel.timeout=31622400", "head.workspace_mib=4398046511104"
    )
    assert (highest.fsdp_port, highest.parallel.timeout) == (65535, 31622400)
    assert read("data.max_dropped=0", "optim.min_lr_ratio=0", "adapter=lora", "adapter.r=1048576")


def test_a_best_checkpoint_needs_evaluations():
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_best=loss/eval needs evaluations"):
        read("checkpoint.keep_best=loss/eval", "n_eval_examples=0")
    # what trains nothing has no checkpoints
    assert read("task=audit", "checkpoint.keep_best=loss/eval", "n_eval_examples=0")


def test_a_recipe_goes_on_by_itself_where_it_is_asked_to():
    assert read("recipe=tisdpo_p", "resume=auto").resume.path == "auto"


@pytest.mark.parametrize(
    ("loss", "metric", "nearest"),
    [("dpo", "rewards_eval/margin", "rewards_eval/margins"), ("sft", "logps_eval/rejected", "")],
)
def test_a_best_checkpoint_is_by_what_evaluations_of_the_loss_say(loss, metric, nearest):
    message = f"keep_best with loss={loss} must be one of loss/eval, .* got '{metric}'.*{nearest}"
    with pytest.raises(ConfigError, match=message):
        read(f"loss={loss}", f"checkpoint.keep_best={metric}")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("batch_size=abc", "batch_size must be an integer, got abc"),
        ("batch_size=4.5", "batch_size must be an integer, got 4.5"),
        ("batch_size=null", "batch_size must be an integer, got null"),
        ("n_epochs=x", "n_epochs must be an integer or null, got x"),
        ("lr=true", "lr must be a number, got true"),
        ("lr=1e-4,1e-5", "lr must be a number, got 1e-4,1e-5"),
        ("debug=maybe", "debug must be true or false, got maybe"),
        ("datasets=hh", r"datasets must be a list such as \[a,b\], got hh"),
        ("resume.allow=${seed}", r"resume.allow must be a list such as \[a,b\], got \${seed}"),
        ("data.columns=[a]", r"data.columns must be a mapping such as '{a: b, c: d}', got \[a\]"),
        ("data.columns={a", "data.columns must be a mapping .* got {a; a shell leaves it whole"),
        ("data.columns=prompt:a", "data.columns must be a mapping .* leaves it whole in quotes"),
        ("data.template_kwargs={a: 0x_}", "data.template_kwargs must be a mapping .* got {a: 0x_}"),
        ('data.columns={prompt: "???"}', r"data\.columns\.prompt must not be \?\?\?$"),
        ("datasets=[???]", r"datasets\[0\] must not be \?\?\?$"),
        ("data.columns=null", "data.columns must be a mapping .* got null"),
        ("exp_name=${nothing}", "exp_name: Interpolation key 'nothing' not found"),
        ("exp_name=${", "exp_name="),
    ],
)
def test_values_of_the_wrong_type_are_refused_with_the_type(argument, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        read(argument)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loss.betta=1"], "loss.betta: loss=tdpo has no option betta; nearest: loss.beta"),
        (["loss=sft", "loss.beta=0.1"], "loss=sft has no beta; it belongs to loss=dpo, ipo"),
        (["loss=dpo", "loss.if_tdpo2=false"], "loss=dpo has no if_tdpo2; .* loss=tdpo"),
        (["loss.reference_free=true"], "loss=tdpo has no reference_free; it had no effect"),
        (["loss=tisdpo", "loss.label_smoothing=0"], "loss=tisdpo has no label_smoothing; .*effect"),
        (["model.blok_name=x"], "model.blok_name: no such option; nearest: model.block_name"),
        (["learning_rate=1"], "learning_rate: no such option; nearest: lr"),
        (["packing=False"], "packing is a group of options: .*; write packing.enabled=false"),
        (["packing=4096"], "packing is a group of options: [^;]*$"),
        (["ref-model=a"], "ref-model: no such option; the reference is the model that training"),
        (["use-peft=true"], "nearest: adapter; write adapter=lora$"),
        (["ref_model=a"], "ref_model: .*; the reference is the model that training starts from"),
        (["loss.rpo_alpha=1"], "loss.rpo_alpha: .*; no loss here has such a term"),
        (["--assistant_only_loss"], "--assistant_only_loss: .* of responses alone"),
        (["num_train_epochs=1"], "nearest: n_epochs"),
        (["load_best_model_at_end=true"], "nearest: checkpoint.keep_best"),
        (["dataset_train_split=a"], "nearest: data.split_names"),
        (["per_device_train_batch_size=1"], "nearest: batch_size"),
        (["gradient_checkpointing=true"], "nearest: activation_checkpointing"),
        (["beta=0.1"], "nearest: loss.beta"),
        (["model_name_or_path=x"], "nearest: model.name_or_path"),
        (["batchsize=1"], "nearest: batch_size"),
        (["data=hh"], "data is a group of options: data.on_error"),
        (["hydra.run.dir=x"], "nearest: run_dir"),
        (["lora_alpha=32"], "nearest: adapter.alpha"),
        (["use_peft=true"], "nearest: adapter; write adapter=lora$"),
        (["loss.precompute_ref_log_probs=True"], "reference.mode; write reference.mode=cache$"),
        (["use_peft=false"], "nearest: adapter$"),
        (["cutoff_len=512"], "nearest: max_length"),
        (["sample_packing=true"], "nearest: packing.enabled"),
        (["label_smoothing=0.1"], "nearest: loss.label_smoothing"),
        (["qqqq=1"], "qqqq: no such option; `python train.py --help`"),
        (["--learning_rat", "0.123"], "options are written KEY=VALUE; write lr=0.123"),
        (["--learning_rate=0.1"], "write lr=0.1"),
        (["--batch-size", "8"], "write batch_size=8"),
        (["--gradient_checkpointing"], "write activation_checkpointing=true"),
        (["--no_gradient_checkpointing"], "write activation_checkpointing=false"),
        (["--report_to", "wandb"], "write wandb.enabled=true"),
        (["--bf16", "True"], "write model.fsdp_policy_mp=bfloat16"),
        (["--use_peft"], "write adapter=lora"),
        (["--dataset_name", "org/name"], r"write datasets=\[org/name\]"),
        (["--lora_target_modules", "q", "v"], r"write adapter.target_modules=\[q,v\]$"),
        (["--warmup_ratio", "0.1"], "nearest: warmup_steps; .*; warmup_steps must be an integer"),
        (["--attn_implementation", "x"], "nearest: model.attention; model.attention must be one"),
        (["--dataset_test_split", "a"], "nearest: data.split_names; data.split_names must be a"),
        (["--eval_steps", "9"], "write eval_every=9; it counts examples, not steps"),
        (["max_steps=9"], "nearest: n_examples; it counts examples, not steps"),
        (["--per_device_train_batch_size", "4"], "write batch_size=4; it counts .* of the whole"),
        (["--config", "dpo.yaml"], "--config: .*; a file of them is configs/recipe/NAME.yaml"),
        (["--no_bf16"], "nearest: model.fsdp_policy_mp$"),
        (["--no_gradient_checkpointing", "true"], "nearest: activation_checkpointing$"),
        (["--use_lora", "false"], "nearest: adapter$"),
        (["--loss_type", "hinge"], "nearest: loss$"),
        (["--rlhf_type", "simpo"], "write loss=simpo$"),
        (["--pref_loss", "sigmoid"], "write loss=dpo$"),
        (["--tuner_type", "lora"], "write adapter=lora$"),
        (["--train_type", "full"], "nearest: adapter$"),
        (["--loss_type", "ipo"], "write loss=ipo$"),
        (["--recipe", "tisdpo_d"], "write recipe=tisdpo_d$"),
        (["--resume_from_checkpoint"], "write resume=auto$"),
        (["--exp_name", "my", "run"], "write exp_name=my run$"),
        (["--help-me"], "nearest: exp_name$"),
        (["--max_steps", "-1"], "nearest: n_examples; .*; n_examples must be >= 1, got -1$"),
        (["--eval_step", "9"], "write eval_every=9; it counts examples, not steps"),
        (["--", "--="], "--: there are no flags but --help and --cfg"),
        (["--multirun"], "no flags but --help and --cfg"),
        (["--config-name", "mine"], "--config-name: there are no flags but --help and --cfg"),
        (["~loss"], "~loss: an option cannot be removed"),
        (["debug"], "debug: options are written KEY=VALUE"),
    ],
)
def test_unknown_keys_are_refused_with_what_was_meant(arguments, message):
    with pytest.raises(ConfigError, match=message):
        read(*arguments)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("loss=tdpoo", f"no such loss, only {', '.join(sorted(LOSSES))}; nearest: tdpo"),
        ("loss=tdpo1", "write loss=tdpo loss.if_tdpo2=false"),
        ("loss=TDPO1", "write loss=tdpo loss.if_tdpo2=false"),
        ("model=pythia", "only blank_model, .*; nearest: pythia28"),
        ("model=mistral", "; write model=mistra$"),
        ("model=Org/Name-7B", "model=blank_model model.name_or_path=Org/Name-7B"),
        ("transform=agressive", "nearest: aggressive"),
        ("transform=rank_based", "write transform.method=rank_based"),
        ("transform=origin", "write transform.method=origin"),
    ],
)
def test_unknown_choices_are_refused_with_the_choices(argument, message):
    with pytest.raises(ConfigError, match=message):
        read(argument)


def test_every_wrong_argument_is_named_at_once():
    with pytest.raises(ConfigError) as refused:
        read("model=pythia", "lr=x", "loss.betta=1", "--beta", "2", "sed=1", "batch_size=8")
    first, *lines = str(refused.value).splitlines()
    assert first == "5 wrong options"
    assert [re.split("[:= ]", line.strip())[0] for line in lines] == [
        "--beta",
        "model",
        "lr",
        "loss.betta",
        "sed",
    ]


def test_options_of_a_wrong_choice_are_not_called_wrong():
    with pytest.raises(ConfigError) as refused:
        read("loss=dppo", "loss.label_smoothing=0.1")
    assert "label_smoothing" not in str(refused.value)


def test_blank_model_needs_a_name():
    with pytest.raises(ConfigError, match=r"^model\.name_or_path is required"):
        read("model=blank_model")


def test_other_names_of_one_option_agree_or_are_refused():
    config = read("model.block=GPT2Block", "local_run_dir=/tmp/x")
    assert (config.model.block_name, config.run_dir) == ("GPT2Block", "/tmp/x")
    with pytest.raises(ConfigError, match=r"model\.block is another name of model\.block_name"):
        read("model.block=A", "model.block_name=B")
    with pytest.raises(ConfigError, match="local_run_dir is another name of run_dir"):
        read("local_run_dir=a", "run_dir=b")


def test_estimating_weights_refuses_what_gives_nothing_or_overwrites(tmp_path):
    same = ["task=estimate_weights", "weights.positive=m", "weights.negative=m"]
    out = f"weights.output_dir={tmp_path}"
    with pytest.raises(ConfigError, match="every weight would be 0"):
        read(*same, out)
    prompts = ["weights.positive_template=harmless", "weights.negative_template=harmful"]
    assert read(*same, *prompts, out).weights.positive == "m"
    with pytest.raises(ConfigError, match="would be overwritten"):
        read(*same, *prompts, out, f"base_data_dir={tmp_path}/")
    assert read(*same, *prompts, out, f"base_data_dir={tmp_path}/", "weights.suffix=-w").task


@pytest.mark.parametrize("task", ["estimate_weights", "tisdpo"])
@pytest.mark.parametrize("name", ["/data/words", "../words"])
def test_weights_are_written_to_their_folder_alone(task, name):
    with pytest.raises(ConfigError, match=rf"{name} is a path, .* set datasets=\[words\]"):
        read(f"task={task}", "loss=tisdpo", f"datasets=[{name}]", "base_data_dir=data")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name_or_pth: x", "mine.yaml: model.name_or_pth: no such option; .*model.name_or_path"),
        ("name_or_path: x\nblock_name: [a]", "mine.yaml: model.block_name: Cannot convert"),
        ("name_or_path: [", "expected the node content.*mine.yaml.*line"),
        ("defaults: [nothing]", "mine.yaml: Could not load 'model/nothing'"),
    ],
)
def test_a_wrong_file_under_configs_is_named(tmp_path, monkeypatch, text, message):
    (tmp_path / "loss").mkdir()
    for name in ("config.yaml", "loss/tdpo.yaml"):
        content = (train.CONFIG_DIR / name).read_text().replace("  - transform: default\n", "")
        (tmp_path / name).write_text(content)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(text + "\n")
    monkeypatch.setattr(train, "CONFIG_DIR", tmp_path)
    with pytest.raises(ConfigError, match=message):
        read("model=mine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["datasets=[a,b]", "data.shares=[0.7,0.2]"], r"1 in all, got \[0.7,0.2\], which is 0.9; "),
        (["datasets=[a,b]", "data.shares=[3,1]"], r"data.shares must be .* <= 1, got 3"),
        (["datasets=[a,b]", "data.shares=[0.6,0.2]"], r"proportions: data.shares=\[0.75,0.25\]$"),
        (["datasets=[a,b]", "data.shares=[1,0]"], r"data.shares must be >= 1e-06 .*, got 0"),
        (["datasets=[a,b]", "data.shares=[1]"], r"each of the 2 datasets \(a, b\), got \[1\]"),
        (["data.shares=[]"], r"each of the 1 datasets \(planted\), got \[\]"),
        (["data.shares=[1]", "data.order=dpo"], "data.shares needs data.order=fastpref, got dpo"),
        (["data.shares=0.5"], r"data.shares must be a list"),
        (["data.test_fraction=1"], r"data.test_fraction must be >= 0 and < 1, got 1"),
        (["data.test_fraction=-0.1"], r"data.test_fraction must be >= 0 and < 1"),
        (["data.deduplicate=some"], r"data.deduplicate must be true or false, got some"),
    ],
)
def test_shares_and_fractions_that_are_none_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        read(*arguments)


def test_shares_may_be_off_by_what_six_digits_are():
    shares = "data.shares=[0.333333,0.333333,0.333333]"
    assert len(read("datasets=[a,b,c]", shares).data.shares or []) == 3


def test_sharing_prompts_of_padded_rows_is_refused():
    with pytest.raises(ValueError, match=r"share_prompt=true needs packing\.enabled=true"):
        PackingConfig(enabled=False, share_prompt="true")


def test_device_that_cannot_is_refused_with_what_can():
    # set after the checks: whether flash-attention is installed differs between machines
    flash = tiny_config()
    flash.model.attention = "flash_attention_2"
    with pytest.raises(ConfigError, match=r"needs a CUDA device, .* set model\.attention=sdpa"):
        flash.check_device("cpu", has_bfloat16=True)
    flash.check_device("cuda", has_bfloat16=True)
    for attention in ("varlen", "flex"):
        with pytest.raises(ConfigError, match=rf"attention={attention} needs a CUDA device"):
            model = ModelConfig(name_or_path="tiny", attention=attention)
            tiny_config(model=model).check_device("cpu", has_bfloat16=True)
    with pytest.raises(ConfigError, match=r"liger=true needs a CUDA device.*liger=auto"):
        liger = ModelConfig(name_or_path="tiny", liger="true")
        tiny_config(model=liger).check_device("cpu", has_bfloat16=True)
    with pytest.raises(ConfigError, match=r"does not compute in bfloat16; .*fsdp_policy_mp=null"):
        tiny_config().check_device("cuda", has_bfloat16=False)


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ("binary", "binary100"),
        ("threshold", "threshold1.0_-1.0"),
        ("threshold_and_scale", "threshold_and_scale0.7_1.3"),
        ("random", "random0.7_1.3"),
        ("rank_based", "rank_based0.7_1.3"),
        ("origin", "origin"),
    ],
)
def test_run_names_of_tisdpo_end_in_the_transform(method, label):
    config = tiny_config(
        loss=TISDPOConfig(), transform=TransformConfig(method=method), datasets=["a", "b"]
    )
    assert config.computed_exp_name() == f"tisdpo_tiny_a_b_{label}"


def test_run_names_follow_model_folder_and_reversal():
    model = ModelConfig(name_or_path="models/Qwen/Qwen2.5-3B-sft/")
    names = [
        tiny_config(model=model, loss=loss, reverse_dataset=True).computed_exp_name()
        for loss in (DPOConfig(), TDPOConfig())
    ]
    assert names == ["dpo_Qwen2.5-3B-sft_hh_reverse", "tdpo_Qwen2.5-3B-sft_hh"]
    of_hub = tiny_config(loss=DPOConfig(), datasets=["org/name", "b"])
    assert of_hub.computed_exp_name() == "dpo_tiny_org-name_b"


def test_help_names_and_explains_every_option():
    help_text = format_help(train.CONFIG_DIR)
    text = " ".join(help_text.split())
    for group in CHOICE_GROUPS:
        for choice in list_choices(train.CONFIG_DIR, group):
            assert re.search(rf"^  {group}={choice}  [A-Z]", help_text, re.M)
    for option in all_options().values():
        assert len(option.doc) > 10, option.key
        assert option.key == "loss.name" or f"{option.key}=" in text
        assert option.key == "loss.name" or option.doc in text


@pytest.mark.parametrize(("width", "longest"), [(20, 80), (80, 80), (96, 96), (200, 96)])
def test_help_fits_the_terminal_and_is_never_hard_to_read(width, longest):
    lines = format_help(train.CONFIG_DIR, width).splitlines()
    assert max(map(len, lines)) <= longest
    assert not any(not a and not b for a, b in pairwise(lines))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("tdpoo", "tdpo"), ("TDPO", "tdpo"), ("tis", "tisdpo"), ("xyz", None), ("", None)],
)
def test_nearest_prefers_what_was_abbreviated(name, meant):
    assert nearest(name, LOSSES) == meant


def test_the_deadline_of_a_job_is_its_end_unless_it_was_given_more_time(monkeypatch):
    options = CheckpointConfig()
    monkeypatch.delenv(deadline.JOB_END, raising=False)
    assert options.deadline_seconds() is None
    monkeypatch.setattr(deadline, "seconds_since_start", lambda: 50.0)
    monkeypatch.setenv(deadline.JOB_END, f"{time.time() + 1000:.0f}")
    assert options.deadline_seconds() == pytest.approx(1050 - deadline.JOB_MARGIN, abs=2)
    assert CheckpointConfig(deadline=None).deadline_seconds() is None
    assert CheckpointConfig(deadline="01:00:00").deadline_seconds() == 3600
    assert CheckpointConfig(deadline="02:03:04").deadline_seconds() == 2 * 3600 + 3 * 60 + 4
    for other in (f"{time.time() - 5:.0f}", "", "soon"):
        monkeypatch.setenv(deadline.JOB_END, other)
        assert options.deadline_seconds() is None
