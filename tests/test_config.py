"""The schema is pinned, contradictions are named before a device is touched, and what validates is sound.

After an intended change: python -m tests.test_config rewrites tests/config_fields.txt and tests/golden/.
"""
import argparse
import math
import pathlib
import typing

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from configs.tiny import get_config
from data import flags
from data.baselines import BASELINE
from data.config import SOURCES
from data.sources import SOURCE
from model.sharding import MESH_AXES, abstract_mesh
from tests.tiny import trace_step
from train.config import BASELINES, CHOICES, OPTIMIZER_KNOBS, RANGES, READ_IF, MeshConfig, TrainConfig
from train.optim import check_optimizer

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("[!_]*.py"))
FIELDS = ROOT / "tests" / "config_fields.txt"
GOLDEN = ROOT / "tests" / "golden"
REWRITE = "if that is intended, run `python -m tests.test_config` and look at the diff"

MOE = ("model.ffn=moe", "model.n_experts=8", "model.n_experts_per_token=2")
MLA = ("model.attention=mla", "model.n_kv_heads=4", "model.kv_lora_rank=16", "model.qk_nope_head_dim=6",
       "model.qk_rope_head_dim=4", "model.v_head_dim=8")
MUP = ("model.parametrization=mup", "model.mup_base_width=32")
# Overrides of configs/tiny.py -> what the one line on stderr must hold. The tests have 8 devices.
CONTRADICTIONS = [
  (["batch_size=6", "mesh.data=4", "mesh.fsdp=2"],
   ["batch_size=6", "data*fsdp*expert=8", "nearest valid batch_size: 8"]),
  (["batch_size=12", "accum_steps=8"], ["batch_size=12", "accum_steps=8", "nearest valid batch_size: 8, 16"]),
  (["batch_size=8", "accum_steps=2", "mesh.data=8"], ["batch_size=8", "8 times accum_steps=2", ": 16"]),
  (["batch_size=0"], ["batch_size=0", "[1, inf)", "nearest valid: 1"]),
  (["mesh.data=3"], ["'data': 3", "3 devices", "8"]),
  (["mesh.data=-1"], ["only one axis may be -1"]),
  (["mesh.tensor=0"], ["'tensor': 0", "at least 1"]),
  (["mesh.tensor=8", "mesh.fsdp=1"], ["n_heads=4", "mesh.tensor=8", "nearest valid mesh.tensor: 4"]),
  (["mesh.tensor=-1", "mesh.fsdp=1"], ["n_heads=4", "mesh.tensor=8"]),
  (["mesh.seq=-1", "mesh.fsdp=1", "seq_len=60"], ["seq_len=60", "mesh.seq=8", "nearest valid mesh.seq: 4"]),
  (["mesh.slices=3"], ["mesh.data=1", "mesh.slices=3", "nearest valid mesh.slices: 1"]),
  (["mesh.slice_axis=fsdp"], ["mesh.slice_axis='fsdp'", "mesh.slices=1"]),
  (["mesh.stage=2", "model.dropout=0.1"], ["model.dropout=0.1", "mesh.stage=2", "nearest valid"]),
  (["mesh.stage=4"], ["model.n_layers=2", "mesh.stage=4", "nearest valid", "4"]),
  (["mesh.stage=2", "mesh.fsdp=4", "model.pipeline_microbatches=4"],
   ["batch_size=8", "model.pipeline_microbatches=4", "nearest valid batch_size: 16"]),
  (["mesh.stage=2", "mesh.fsdp=4", "model.n_layers=4", "model.pipeline_repeats=2",
    "model.pipeline_microbatches=1"], ["model.pipeline_microbatches=1", "mesh.stage=2", "nearest valid: 2"]),
  (["mesh.seq=8", "mesh.fsdp=1", "model.context=ring", "model.attention_impl=dot_product"],
   ["model.context='ring'", "model.attention_impl='dot_product'", "'chunked'"]),
  (["mesh.seq=8", "mesh.fsdp=1", "model.context=ulysses"],
   ["model.context='ulysses'", "8 devices of a row", "n_heads=4"]),
  (["model.rules.length=('tensor',)"], ["model.rules.length", "model.rules.vocab", "tensor"]),
  (["model.rules.layers=('fsdp',)"], ["model.rules.layers='fsdp'", "stage"]),
  (["model.rules.vocab=('tensor', 'seq')", "model.rules.loss_length=('stage',)"],
   ["model.rules.length", "model.rules.vocab", "seq"]),
  (["model.rules.residual=('seq', 'seq')"], ["model.rules.residual", "names an axis twice"]),
  (["model.rules.moment=()"], ["model.rules.moment=()", "model.rules.gradient", "fsdp"]),
  (["model.pipeline_repeats=3"], ["model.pipeline_repeats=3", "n_layers=2", "nearest valid: 2"]),
  (["mesh.seq=2", "mesh.fsdp=4", "model.dropout=0.1", "model.context=zigzag", "model.attention_impl=chunked"],
   ["model.dropout=0.1", "model.context='zigzag'", "nearest valid: model.context='ring'"]),
  (["balance.loss=0.1"], ["balance.loss=0.1", "model.ffn='swiglu'"]),
  ([*MOE, "model.ffn_bias=True"], ["model.ffn_bias=True", "model.ffn='moe'"]),
  (["model.rules.residual=()"], ["model.rules.residual", "model.rules.length", "seq"]),
  (["model.ffn=moe"], ["model.ffn='moe'", "model.n_experts"]),
  ([*MOE, "model.n_experts_per_token=9"], ["model.n_experts_per_token=9", "nearest valid: 8"]),
  ([*MOE, "model.n_expert_groups=3", "model.n_groups_per_token=1"],
   ["model.n_experts=8", "model.n_expert_groups=3", "nearest valid n_expert_groups: 2, 4"]),
  ([*MOE, "model.n_expert_groups=4"], ["model.n_expert_groups=4", "model.n_groups_per_token=None"]),
  ([*MOE, "model.exchange=all_to_all"], ["model.exchange='all_to_all'", "model.dispatch='dropless'"]),
  ([*MOE, "model.exchange=ragged", "model.dispatch=capacity"], ["model.exchange='ragged'", "'gather'"]),
  ([*MOE, "model.capacity_factor=2.0"], ["model.capacity_factor=2.0", "model.dispatch='dropless'"]),
  ([*MOE, "model.n_dense_layers=2"], ["model.n_dense_layers=2", "model.n_layers=2", "nearest valid: 1"]),
  ([*MOE, "mesh.expert=8", "mesh.fsdp=1", "model.n_experts=12"],
   ["model.n_experts=12", "mesh.expert=8", "nearest valid mesh.expert: 4"]),
  ([*MOE, "balance.bias_rate=0.1"], ["balance.bias_rate=0.1", "model.router_bias=False"]),
  (["balance.z_loss=0.1"], ["balance.z_loss=0.1", "model.ffn='swiglu'"]),
  (["model.n_kv_heads=3"], ["model.n_heads=4", "model.n_kv_heads=3", "nearest valid n_kv_heads: 2, 4"]),
  (["model.n_heads=5", "model.n_kv_heads=5"], ["model.d_model=64", "model.n_heads=5", "4, 8"]),
  (["model.head_dim=7"], ["model.head_dim=7", "even", "6, 8"]),
  (["model.rotary_dim=3"], ["model.rotary_dim=3", "even", "2, 4"]),
  (["model.rotary_dim=18"], ["model.rotary_dim=18", "model.head_dim=16", "nearest valid: 16"]),
  (["model.positions=learnt"], ["model.positions='learnt'", "did you mean 'learned'?"]),
  (["model.positions=learned"], ["model.positions='learned'", "model.max_length=None", "both"]),
  (["model.positions=learned", "model.max_length=8"], ["seq_len=64", "model.max_length=8", "valid: 8"]),
  (["model.rope_theta_local=1e4"], ["model.rope_theta_local=10000.0", "model.window=None"]),
  (["model.rope_scaling.kind=yran"], ["model.rope_scaling.kind='yran'", "did you mean 'yarn'?"]),
  (["model.rope_scaling.kind=yarn"], ["kind='yarn'", "model.rope_scaling.original_length"]),
  (["model.rope_scaling.kind=yarn", "model.rope_scaling.original_length=64", "model.rope_theta=1"],
   ["kind='yarn'", "model.rope_theta=1.0", "'linear'"]),
  (["model.rope_scaling.kind=llama3", "model.rope_scaling.original_length=64",
    "model.rope_scaling.low_freq_factor=4"], ["low_freq_factor=4.0", "high_freq_factor=4.0", "1.0 and 4.0"]),
  (["model.rope_scaling.kind=longrope", "model.rope_scaling.original_length=64",
    "model.rope_scaling.short_factors=(1, 2)"], ["short_factors has 2", "head_dim=16", "nearest valid: 8"]),
  (["model.rope_scaling.kind=longrope", "model.rope_scaling.original_length=64",
    "model.rope_scaling.short_factors=(1, 0)"], ["short_factors=0.0", "(0, inf)"]),
  (["model.rope_scaling.factor=2"], ["model.rope_scaling.factor=2.0", "model.rope_scaling.kind='none'"]),
  (["model.qk_norm=rmsnorm", "model.qk_norm_over=al"], ["model.qk_norm_over='al'", "did you mean 'all'?"]),
  (["model.attention=mla"], ["model.attention='mla'", "model.kv_lora_rank", "512"]),
  ([*MLA, "model.n_kv_heads=2"], ["model.n_kv_heads=2", "'mla'", "nearest valid: 4"]),
  ([*MLA, "model.qkv_bias=True"], ["model.qkv_bias=True", "'mla'", "nearest valid: False"]),
  ([*MLA, "model.qk_rope_head_dim=3"], ["model.qk_rope_head_dim=3", "even", "2, 4"]),
  ([*MLA, "model.kv_lora_rank=12"], ["model.kv_lora_rank=12", "mesh.fsdp=8", "nearest valid mesh.fsdp: 4"]),
  (["model.kv_lora_rank=12"], ["model.kv_lora_rank=12", "model.attention='gqa'", "'mla'"]),
  (["model.parametrization=mup"], ["model.parametrization='mup'", "model.mup_base_width", "valid: 64"]),
  ([*MUP, "model.head=tied"], ["model.head='tied'", "'mup'", "nearest valid: 'untied'"]),
  ([*MUP, *MLA], ["model.attention='mla'", "'mup'", "nearest valid: 'gqa'"]),
  ([*MUP, "optim.name=muon"], ["optim.name='muon'", "'mup'", "nearest valid: 'adamw'"]),
  ([*MUP, "optim.name=sgd"], ["optim.name='sgd'", "'mup'", "nearest valid: 'adamw'"]),
  (["model.n_layers=0"], ["model.n_layers=0", "nearest valid: 1"]),
  (["model.n_layers=3", "model.window=8", "model.layer_pattern=('local', 'global')"],
   ["model.n_layers=3", "nearest valid: 2, 4"]),
  (["model.layer_pattern=('local',)"], ["model.window=None", "model.layer_pattern=('local',)"]),
  (["model.layer_pattern=('near',)"], ["model.layer_pattern='near'", "['global', 'local']"]),
  (["model.precision=fp16"], ["model.precision='fp16'", "'bf16'", "did you mean"]),
  (["model.dropout=1.0"], ["model.dropout=1.0", "[0, 1)"]),
  (["model.n_experts=4"], ["model.n_experts=4", "model.ffn='swiglu'"]),
  (["optim.warmup_steps=40"], ["optim.warmup_steps=40", "steps=40", "nearest valid: 39"]),
  (["optim.schedule=cosin"], ["optim.schedule='cosin'", "did you mean 'cosine'?"]),
  (["optim.name=adam"], ["optim.name='adam'", "did you mean 'adamw'?"]),
  (["optim.name=sgd", "optim.b2=0.9"], ["optim.b2=0.9", "optim.name='sgd'", "momentum"]),
  (["optim.lr=-1"], ["optim.lr=-1.0"]),
  (["optim.grad_clip=0"], ["optim.grad_clip=0.0", "(0, inf)", "nearest valid: None"]),
  (["eval.every=0"], ["eval.every=0", "nearest valid: 1, None"]),
  (["log.wandb=yes"], ["log.wandb='yes'", "['offline', 'online']"]),
  (["data.packing=best"], ["data.packing='best'", "did you mean 'best_fit'?"]),
  (["data.val_fraction=1"], ["data.val_fraction=1.0", "[0, 1)"]),
  (["data.tokenizer.kind=huggingface"], ["data.tokenizer.path=None", "tokenizer.json"]),
  (["data.sources[0].weight=-1"], ["data.sources[0].weight=-1.0"]),
  (["data.weights_from_step=((5, (1.0, 2.0)),)"], ["data.weights_from_step", "1 sources"]),
  (["data.weights_from_step=((5, 1),)"], ["(5, 1)", "1 sources", "such as (100, (1.0,))"]),
  (["data.weights_from_step=(('a', (1,)),)"], ["('a', (1,))", "such as (100, (1.0,))"]),
  (["data.weights_from_step=((5, (float('nan'),)),)"], ["data.weights_from_step"]),
  (["data.sources[0].weight=0"], ["data.sources: weights [0.0]", "not be all 0"]),
  (["data.sources[0].kind=sintetic"], ["data.sources[0].kind='sintetic'", "did you mean 'synthetic'?"]),
  (["data.tokenizer.kind=sentencepeice"], ["did you mean 'sentencepiece'?"]),
  (["model.vocab_size=300"], ["model.vocab_size=300", "tokenizer.vocab_size=384", "nearest valid: None"]),
  (["model.rules.heads=('tensr',)"], ["model.rules.heads='tensr'", "did you mean 'tensor'?"]),
  (["model.layer_pattern=()"], ["model.layer_pattern=()", "nearest valid: None"]),
  (["model.rules.batch=('data', 'data')"], ["model.rules.batch=('data', 'data')", "twice"]),
  (["model.rules.embed=('tensor',)"], ["model.rules.embed", "model.rules.vocab", "both name tensor"]),
  (["model.rules.batch=('foo',)"], ["model.rules.batch='foo'", "'fsdp'"]),
  (["optim.decay_scale=(('norm',),)"], ["optim.decay_scale", "('norm',)", "(pattern, number from 0)"]),
  (["optim.lr_scale=(('.*', 'fast'),)"], ["optim.lr_scale", "('.*', 'fast')"]),
  (["optim.lr_scale=(('.*', True),)"], ["optim.lr_scale", "('.*', True)"]),
  (["optim.freeze=(('.*', 1),)"], ["optim.freeze", "('.*', 1)", "True or False"]),
  (["optim.freeze=(('(', True),)"], ["optim.freeze", "'('", "not a regular expression"]),
  (["seed=-1"], ["seed=-1", "[0, 4294967296)", "nearest valid: 0"]),
  (["seed=4294967296"], ["seed=4294967296", "[0, 4294967296)"]),
  (["optim.lr=nan"], ["optim.lr=nan", "(0, inf)"]),
  (["report.baselines=('gzip', 'ngram')"], ["report.baselines='ngram'", "did you mean 'ngram5'?"]),
  (["checkpoint.best=eval/val/los"], ["checkpoint.best='eval/val/los'", "did you mean 'eval/val/loss'?"]),
  (["checkpoint.best=eval/val/bpb", "checkpoint.every=30"],
   ["checkpoint.every=30", "eval.every=20", "nearest valid checkpoint.every: 20, 40"]),
]

# The same for settings that nothing reads where another one is what it is.
UNREAD = [
  ("optim.decay_fraction=0.5", "optim.schedule='cosine'", "'wsd'"),
  ("init_seed=1 init_from=x", "init_from='x'", "nearest valid: 0"),
  ("optim.final_lr_fraction=0.5 optim.schedule=constant", "optim.schedule='constant'", "'linear'"),
  ("optim.final_lr_fraction=0.5 optim.schedule=inverse_sqrt", "optim.schedule='inverse_sqrt'", "0.1"),
  ("optim.decay_scale=(('.*',2.0),) optim.weight_decay=0", "optim.weight_decay=0.0", "set"),
  ("model.positions=none model.rope_theta=1e6", "model.positions='none'", "nearest valid: 10000.0"),
  ("model.qk_norm_over=all", "model.qk_norm=None", "nearest valid: 'head'"),
  ("model.init_std=0.1 model.init=fan_in", "model.init='fan_in'", "nearest valid: 0.02"),
  ("model.mup_base_width=32", "model.parametrization='standard'", "nearest valid: None"),
  ("model.mup_base_head_dim=8", "model.parametrization='standard'", "nearest valid: None"),
  ("data.tokenizer.model=unigram data.tokenizer.vocab_size=8192 data.tokenizer.path=x",
   "data.tokenizer.path='x'", "nearest valid: 'bpe'"),
  ("data.tokenizer.path=x", "data.tokenizer.vocab_size=384", "nearest valid: 8192"),
  ("data.tokenizer.train_bytes=9 data.tokenizer.path=x data.tokenizer.vocab_size=8192", "'x'", "10000000"),
  ("data.temperature=2 data.sources[0].weight=1", "data.sources[0].weight=1.0", "nearest valid: 1.0"),
  ("data.sources[0].kind=text data.sources[0].path=x", "data.sources[0].documents=400", "'synthetic'"),
  ("data.sources[0].path=x", "data.sources[0].kind='synthetic'", "nearest valid: ''"),
  ("data.sources[0].split=test", "data.sources[0].kind='synthetic'", "'tfds'"),
  ("data.sources[0].text_key=body", "data.sources[0].kind='synthetic'", "'jsonl' or 'parquet' or 'tfds'"),
  ("data.val_fraction=0", "eval.every=20", "nearest valid: 250"),
  ("checkpoint.every=None checkpoint.keep_last=3", "checkpoint.every=None", "nearest valid: 2"),
  ("checkpoint.every=None checkpoint.best=eval/val/loss", "checkpoint.every=None", "nearest valid: None"),
  ("eval.every=None checkpoint.best=eval/val/loss", "eval.every=None", "nearest valid: None"),
  ("report.n_tokens=5", "report.prompts=()", "nearest valid: 128"),
  ("report.temperature=0.1", "report.prompts=()", "nearest valid: 0.7"),
  ("log.wandb_project=mine", "log.wandb=None", "nearest valid: 'assay'"),
]
CONTRADICTIONS += [(overrides.split(), list(fragments)) for overrides, *fragments in UNREAD]


def field_names() -> list[str]:
  return sorted(name.replace("[0]", "[]") for name in flags.leaves(TrainConfig()))


def golden(config: str) -> str:
  """What --print_config prints for a shipped config."""
  resolved = flags.read_config(str(ROOT / "configs" / f"{config}.py")).validate()
  lines = [f"{k} = {v!r}" for k, v in sorted(flags.leaves(resolved).items())]
  return "\n".join([*lines, f"hash {flags.config_hash(resolved)}", ""])


def test_the_set_of_fields_is_pinned():
  assert FIELDS.read_text().split() == field_names(), f"fields were added or removed: {REWRITE}"


@pytest.mark.parametrize("config", CONFIGS)
def test_resolved_config_equals_its_golden(config):
  path = GOLDEN / f"{config}.txt"
  assert path.exists(), f"no golden for configs/{config}.py: {REWRITE}"
  assert path.read_text() == golden(config), f"configs/{config}.py or a default has changed: {REWRITE}"


def test_every_golden_has_its_config():
  assert sorted(p.stem for p in GOLDEN.glob("*.txt")) == CONFIGS, REWRITE


@pytest.mark.parametrize("config", CONFIGS)
def test_print_config_prints_the_golden(config, capsys):
  with pytest.raises(SystemExit) as exit_:
    flags.load(argparse.ArgumentParser("prog"), [f"--config={ROOT}/configs/{config}.py", "--print_config"])
  assert exit_.value.code == 0 and capsys.readouterr().out == (GOLDEN / f"{config}.txt").read_text()


@pytest.mark.parametrize("overrides, fragments", CONTRADICTIONS, ids=[" ".join(c[0]) for c in CONTRADICTIONS])
def test_contradictions_exit_2_with_names_and_values(overrides, fragments, capsys):
  argv = [f"--config={ROOT}/configs/tiny.py", *(f"--config.{o}" for o in overrides)]
  with pytest.raises(SystemExit) as exit_:
    flags.load(argparse.ArgumentParser("prog"), argv)
  message = capsys.readouterr().err
  assert exit_.value.code == 2 and message.count("\n") == 1
  assert all(f in message for f in fragments), message


def test_the_tables_of_the_schema_are_those_of_the_code():
  assert set(SOURCES) == set(SOURCE) and set(BASELINES) == set(BASELINE)
  fields = set(field_names())
  ranges = [name for names in RANGES.values() for name in names]
  assert len(ranges) == len(set(ranges)) and not {*ranges, *CHOICES} - fields
  assert not {name for setting, other, _ in READ_IF for name in (setting, other)} - fields
  numeric = {name.replace("[0]", "[]") for name, _, type_ in flags.walk(TrainConfig())
             if {int, float} & {type_, *typing.get_args(type_)}}
  assert numeric - set(ranges) == {f"mesh.{axis}" for axis in MESH_AXES}


@pytest.mark.parametrize("value", [-1, 0, math.nan, math.inf])
def test_a_number_is_refused_or_the_step_traces(value):
  """Whatever number a setting is given."""
  for name, _, type_ in flags.walk(get_config()):
    types = {type_, *typing.get_args(type_)}
    if not {int, float} & types or typing.get_origin(type_) in (tuple, list):
      continue
    if float not in types and not math.isfinite(value):
      continue
    cfg = flags.override(get_config(), [f"{name}={value}"])
    try:
      cfg.validate(n_devices=1)
      check_optimizer(cfg)
    except ValueError as e:
      assert name.rpartition(".")[2] in str(e) and str(value) in str(e), e
      continue
    assert math.isfinite(value), name
    if not name.startswith(("eval", "report", "data", "checkpoint", "log")):
      trace_step(cfg, abstract_mesh(data=1))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unknown_preset_is_refused(name):
  with pytest.raises(ValueError, match="arg='large'"):
    flags.read_config(f"{ROOT}/configs/{name}.py:large")


@pytest.mark.parametrize("name", OPTIMIZER_KNOBS)
def test_print_config_shows_the_knobs_that_will_be_used(name):
  cfg = flags.override(get_config(), [f"optim.name={name}"]).validate()
  resolved = {knob: getattr(cfg.optim, knob) for knob in ("b1", "b2", "eps", "momentum")}
  assert resolved == {"b1": None, "b2": None, "eps": None, "momentum": None} | OPTIMIZER_KNOBS[name]
  given = [f"optim.{knob}=0.5" for knob in OPTIMIZER_KNOBS[name]]
  cfg = flags.override(get_config(), [f"optim.name={name}", *given])
  assert {getattr(cfg.validate().optim, k) for k in OPTIMIZER_KNOBS[name]} == {0.5}


def unresolved(**fields) -> TrainConfig:
  config = TrainConfig(**fields)
  config.data.sources[0].kind = "synthetic"
  return config


@pytest.mark.parametrize("n_devices, mesh, words", [
  (3, {"tensor": 3}, "model.padded_vocab_size=8192 is not a multiple of mesh.tensor=3"),
  (3, {"tensor": -1, "fsdp": 1}, "model.padded_vocab_size=8192 is not a multiple of mesh.tensor=3"),
  (5, {"fsdp": 5}, "model.d_model=48 is not a multiple of mesh.fsdp=5"),
  (4, {"data": 4, "fsdp": 1, "tensor": 2}, "needs 8 devices or a multiple; this run has 4"),
])
def test_contradictions_with_the_number_of_devices(n_devices, mesh, words):
  config = unresolved(batch_size=60, mesh=MeshConfig(**mesh))
  config.model.n_heads, config.model.d_model, config.model.d_ff = 6, 48, 96
  with pytest.raises(ValueError) as error:
    config.validate(n_devices=n_devices)
  assert words in str(error.value)


def test_validate_leaves_no_derived_field_open_and_is_idempotent():
  once = unresolved().validate()
  for name in ("vocab_size", "n_kv_heads", "head_dim", "d_ff", "layer_pattern", "param_dtype"):
    assert getattr(once.model, name) is not None, name
  before = flags.config_hash(once)
  assert flags.config_hash(once.validate()) == before


SIZE = st.sampled_from([-1, 1, 1, 1, 1, 1, 2, 3])
RARELY = st.sampled_from([1] * 9 + [2])
MESH = {"data": SIZE, "fsdp": SIZE, "tensor": SIZE, "stage": RARELY, "seq": RARELY, "expert": RARELY}
MODEL = {
  "n_heads": st.sampled_from([0, 1, 2, 3, 4, 6, 6, 6, 8, 12]),
  "n_kv_heads": st.sampled_from([None, None, None, 0, 1, 2, 2, 3, 4, 6]),
  "head_dim": st.sampled_from([None, 0, 5, 8, 8, 8, 8]),
  "d_model": st.sampled_from([6, 48, 48, 64, 64]),
  "n_layers": st.sampled_from([0, 1, 2, 2, 2, 2]),
  "d_ff": st.sampled_from([None, 96, 96, 100]),
}


@settings(max_examples=500, deadline=None)
@given(mesh=st.fixed_dictionaries(MESH), model=st.fixed_dictionaries(MODEL),
       accum=st.sampled_from([0, 1, 1, 1, 2, 3]), batch=st.sampled_from([0, 6, 7, 8, 12, 72, 72, 72]),
       rest=st.sampled_from([None, 1, 2, 2, 2, 5]))
def test_validate_refuses_or_the_arithmetic_holds(mesh, model, accum, batch, rest):
  """`rest` is what an axis of size -1 gets."""
  n_devices = rest and math.prod(s for s in mesh.values() if s > 0) * (rest if -1 in mesh.values() else 1)
  config = unresolved(batch_size=batch, accum_steps=accum, mesh=MeshConfig(**mesh))
  for name, value in model.items():
    setattr(config.model, name, value)
  try:
    config.validate(n_devices=n_devices)
  except ValueError as e:
    event("refused")
    assert "=" in str(e) or "mesh" in str(e), e
    return
  event("validated")
  model, sizes = config.model, {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
  assert model.n_heads % model.n_kv_heads == 0 and model.head_dim % 2 == 0 and model.n_layers > 0
  assert batch % accum == 0
  if n_devices is not None:
    fixed = math.prod(s for s in sizes.values() if s > 0)
    sizes = {axis: n_devices // fixed if s == -1 else s for axis, s in sizes.items()}
    assert math.prod(sizes[axis] for axis in MESH_AXES) == n_devices
    micro = sizes["stage"] if sizes["stage"] > 1 else 1
    assert batch // accum % (sizes["data"] * sizes["fsdp"] * sizes["expert"] * micro) == 0
    assert config.seq_len % (sizes["seq"] * sizes["stage"]) == 0 and model.n_layers % sizes["stage"] == 0
    split = (model.n_heads, model.d_ff, model.padded_vocab_size)
    assert not any(n % sizes["tensor"] for n in split)
    assert model.d_model % sizes["fsdp"] == 0


def main():
  FIELDS.write_text("\n".join(field_names()) + "\n")
  GOLDEN.mkdir(exist_ok=True)
  for path in GOLDEN.glob("*.txt"):
    path.unlink()
  for config in CONFIGS:
    (GOLDEN / f"{config}.txt").write_text(golden(config))


if __name__ == "__main__":
  main()
