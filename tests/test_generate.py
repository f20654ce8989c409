"""Text in, text out: streaming, stop strings, and the command line on a small run."""
import collections
import io
import json
import os
import re
import shutil
import signal

import pytest

from configs.tiny import get_config
from data.config import TokenizerConfig
from data.flags import as_json, write_config_json
from data.tokenizer import Tokenizer, train_tokenizer
from infer.engine import Engine, Token
from infer.generate import find_run, main, make_parser, read_requests
from infer.load import keep_tokenizer, load_params, open_chat, open_run
from infer.sampling import Sampling
from infer.text import Reader, complete, encode_prompt, stream
from tests.test_chat import TEMPLATES, byte_level
from tests.tiny import make_params, mesh_of
from train.checkpoint import Checkpointer

TEXT = "naïve café, 東京 and 🦜🦜 talk: print('hello, wörld')\n" * 3
CORPUS = [TEXT + "def f(x):\n  return x + 1\n" + "The quick brown fox jumps over the lazy dog.\n" * 5] * 20


def bytes_tokenizer(pieces=()):
  """An id a byte, then the pieces, then the end."""
  table = [bytes([b]) for b in range(256)] + [p.encode() for p in pieces] + [b""]
  return Tokenizer(encode_batch=lambda texts: [list(t.encode()) for t in texts], token_bytes=table, sha256="",
                   bos_id=len(table) - 1, eos_id=len(table) - 1, pad_id=len(table) - 1)


def read_all(tokenizer, ids, stop=(), prompt=()):
  """(pieces, how many tokens were read)."""
  reader, pieces = Reader(tokenizer, list(prompt), stop), []
  for n, token in enumerate(ids, 1):
    pieces.append(reader.push(token))
    if reader.stopped:
      return pieces, n
  return [*pieces, reader.finish()], len(ids)


# Characters and stop strings.

def test_no_piece_holds_half_a_character():
  pieces, _ = read_all(bytes_tokenizer(), TEXT.encode())
  assert "".join(pieces) == TEXT
  assert not any("\ufffd" in p for p in pieces)
  cut = TEXT.encode()[:TEXT.encode().index("🦜".encode()) + 2]  # The text ends within a character.
  assert "".join(read_all(bytes_tokenizer(), cut)[0]) == TEXT[:TEXT.index("🦜")]


def test_a_prompt_that_ends_within_a_character_is_continued():
  raw = "🦜!".encode()
  assert "".join(read_all(bytes_tokenizer(), raw[2:], prompt=raw[:2])[0]) == "🦜!"


@pytest.mark.parametrize("stop, text", [
  (("END",), "one two E EN "),
  (("EN END", "zzz"), "one two E "),
  (("two E EN END", "E EN"), "one two "),  # The one complete first, whatever the tokens.
  (("E EN", "two E EN"), "one "),  # Both at once: nothing of either.
  (("never", "EEND"), "one two E EN END three"),
  ((" three",), "one two E EN END"),
  (("three!",), "one two E EN END three"),  # Held back to the very end.
  (("o",), "")])
def test_stop_strings_over_token_boundaries(stop, text):
  """However the text is cut into tokens, it ends before the stop string and not a token later than needed."""
  full = "one two E EN END three"
  for pieces in ([], ["one", " two E", " EN EN", "D three"], ["D thr"], ["EN END three"]):
    tokenizer, ids, rest = bytes_tokenizer(pieces), [], full
    while rest:
      piece = next((i for i, p in enumerate(pieces) if rest.startswith(p)), None)
      ids.append(ord(rest[0]) if piece is None else 256 + piece)
      rest = rest[len(tokenizer.token_bytes[ids[-1]]):]
    shown, n_read = read_all(tokenizer, ids, stop)
    assert "".join(shown) == text
    if text != full:
      ends = min(full.index(s) + len(s) for s in stop if s in full)
      read = len(b"".join(tokenizer.token_bytes[i] for i in ids[:n_read]))
      assert ends <= read < ends + len(tokenizer.token_bytes[ids[n_read - 1]])


# A run on disk. Its model is not trained, so that it says anything, bytes of broken characters included.

@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
  path = tmp_path_factory.mktemp("runs") / "small"
  path.mkdir()
  cfg = get_config()
  cfg.optim.ema, cfg.data.tokenizer.vocab_size, cfg.model.init = 0.9, 320, "fan_in"
  cfg.validate(n_devices=8)
  train_tokenizer(CORPUS, TokenizerConfig(vocab_size=320), path.parent / "elsewhere.model")
  keep_tokenizer(path.parent / "elsewhere.model", "sentencepiece", path)
  write_config_json(path / "config.json", cfg, [])
  mesh = mesh_of("fsdp_tensor")
  checkpoints = Checkpointer(path / "checkpoints", cfg.checkpoint)
  params, ema, later = (make_params(cfg.model, mesh, i)[1] for i in range(3))
  checkpoints.save(20, {"params": params, "ema": ema}, {"config": as_json(cfg)})
  checkpoints.save(40, {"params": params, "ema": later}, {"config": as_json(cfg)})
  checkpoints.wait()
  return path


@pytest.fixture(scope="module")
def spoken(run_path):
  """(engine, tokenizer) of its newest weights."""
  run, mesh = open_run(run_path), mesh_of("one")
  params, step, weights, rejected = load_params(run, run.model, mesh)
  assert (step, weights, rejected) == (40, "ema", [])
  return Engine(run.model, params, mesh, stop_ids=(run.tokenizer.eos_id,), slots=4, row_buckets=(4,),
                max_length=128), run.tokenizer


def test_streamed_pieces_are_the_completion(spoken):
  engine, tokenizer = spoken
  prompts, settings = ["", "The quick", "naïve 東"], [Sampling(seed=i, max_tokens=40) for i in range(3)]
  texts = ["", "", ""]
  for piece in stream(engine, tokenizer, prompts, settings):
    texts[piece.request] += piece.text
  done = complete(engine, tokenizer, prompts, settings)
  assert texts == [c.text for c in done]
  for prompt, c in zip(prompts, done):
    whole = tokenizer.decode(encode_prompt(tokenizer, prompt) + c.tokens)
    assert whole.removesuffix("\ufffd").startswith(prompt + c.text.removesuffix("\ufffd"))
    assert len(c.tokens) == len(c.logprobs) and c.finish in ("stop", "length")


def test_a_stop_string_ends_one_request_and_not_the_others(spoken):
  engine, tokenizer = spoken
  settings = Sampling(seed=5, max_tokens=60, temperature=0.8)
  free, other = complete(engine, tokenizer, ["The", "def"], settings)
  stop = free.text[10:13]  # Wherever the tokens cut it.
  cut, same = complete(engine, tokenizer, ["The", "def"], [
      Sampling(seed=5, max_tokens=60, temperature=0.8, stop=(stop,)), settings])
  assert (cut.text, cut.finish) == (free.text[:free.text.index(stop)], "stop")
  assert len(cut.tokens) < len(free.tokens)
  assert same == other


# The command line.

def run_main(capsys, *argv):
  try:
    code = main(list(argv))
  except SystemExit as e:  # argparse's own.
    code = e.code
  out, err = capsys.readouterr()
  return code, out, err


def test_one_prompt_is_streamed(run_path, spoken, capsys):
  code, out, err = run_main(capsys, f"--run={run_path}", "--prompt=The quick", "--max_tokens=70", "--seed=3")
  assert code == 0
  wanted, = complete(*spoken, ["The quick"], Sampling(seed=3, max_tokens=70))
  assert out == "The quick" + wanted.text + "\n"
  assert "step 40: ema" in err and "prefill" in err and "decode" in err and "tokens/s" in err
  assert "more than the 64 that the model was trained on" in err


def test_many_prompts_with_settings_of_their_own(run_path, spoken, tmp_path, capsys):
  file, out_file = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
  file.write_text('{"prompt": "The", "temperature": 0, "max_tokens": 4}\n'
                  '{"prompt": "", "stop": "e", "seed": 9}\n')
  code, out, _ = run_main(
      capsys, f"--run={run_path}", f"--prompts_file={file}", "--prompt=def f(", f"--out={out_file}",
      "--n_samples=2", "--max_tokens=12", "--top_k=30", "--batch_size=3")
  assert (code, out) == (0, "")
  records = map(json.loads, out_file.read_text().splitlines())
  records = sorted(records, key=lambda r: (r["prompt_index"], r["sample"]))
  assert [r["prompt"] for r in records] == ["def f(", "def f(", "The", "The", "", ""]
  settings = [Sampling(seed=i, max_tokens=12, top_k=30) for i in range(2)]
  settings += [Sampling(seed=i, max_tokens=4, temperature=0.0, top_k=30) for i in range(2)]
  settings += [Sampling(seed=9 + i, max_tokens=12, top_k=30, stop=("e",)) for i in range(2)]
  for record, wanted in zip(records, complete(*spoken, [r["prompt"] for r in records], settings)):
    assert (record["text"], record["tokens"], record["finish"]) == (wanted.text, wanted.tokens, wanted.finish)
  assert records[2]["text"] == records[3]["text"]  # Greedy.
  code, out, _ = run_main(capsys, f"--run={run_path}", "--prompt=a", "--prompt=b", "--max_tokens=3")
  assert code == 0 and "--- prompt 1 (3 tokens, length)\na" in out and "--- prompt 2" in out


def test_weights_and_steps_are_told_apart(run_path, capsys):
  texts = set()
  for flags in ([], ["--weights=params"], ["--step=20"]):
    code, out, _ = run_main(capsys, f"--run={run_path}", "--prompt=The", "--temperature=0", "--max_tokens=20",
                            *flags)
    texts.add(out)
    assert code == 0
  assert len(texts) == 3


@pytest.mark.parametrize("flags, words", [
  (["--run={}/../smal", "--prompt=a"], "is no run.*there is small"),
  (["--run={}/../empty", "--prompt=a"], "no finished checkpoint"),
  (["--run={}"], "give --prompt=TEXT"),
  (["--run={}", "--promt=a"], "unknown argument --promt=a; did you mean --prompt"),
  (["--run={}", "--prompt=a", "--temperature=-1"], "temperature=-1.0 must be 0 .which is greedy."),
  (["--run={}", "--prompt=a", "--top_k=many"], "invalid int value"),
  (["--run={}", "--prompt=a", "--step=30"], "--step=30 was not saved; saved: 20, 40"),
  (["--run={}", "--prompt=a", "--tensor=3"], "needs 3 devices or a multiple; this run has 8"),
  (["--run={}", "--prompt=a", "--tensor=8"], "n_heads=4 is not a multiple of mesh.tensor=8; nearest .*: 4"),
  (["--run={}", "--prompts_file={}/none"], "cannot be read"),
  (["--run={}", "--prompts_file={}/../bad.jsonl"], "bad.jsonl, line 2: unknown setting 'topp'")])
def test_mistakes_exit_2_and_say_what(run_path, capsys, flags, words):
  (run_path.parent / "empty").mkdir(exist_ok=True)
  (run_path.parent / "empty" / "config.json").write_text("{}")
  (run_path.parent / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "topp": 1}\n')
  code, _, err = run_main(capsys, *(flag.replace("{}", str(run_path)) for flag in flags))
  assert code == 2
  assert "Traceback" not in err
  assert re.search(words, err), err


def test_a_pattern_is_the_newest_finished_run(tmp_path, capsys):
  for name, last in (("a-1", 40), ("a-2", 40), ("a-3", 20), ("b-1", 20)):
    (tmp_path / name / "checkpoints" / str(last)).mkdir(parents=True)
    (tmp_path / name / "config.json").write_text('{"config": {"steps": 40}}')
  os.utime(tmp_path / "a-1" / "checkpoints" / "40", (2e9, 2e9))
  for pattern in (f"{tmp_path}/a-*", f"{tmp_path}/a"):
    assert find_run(pattern) == f"{tmp_path}/a-1"
    assert capsys.readouterr().err == f"--run={pattern}: {tmp_path}/a-1, the newest of 2 finished\n"
  assert find_run(f"{tmp_path}/a-3") == f"{tmp_path}/a-3" and find_run("nowhere") == "nowhere"
  with pytest.raises(ValueError, match="no run is finished.*b-1 at step 20 of 40"):
    find_run(f"{tmp_path}/b*")


def test_lines_of_json_end_at_line_feeds_only(tmp_path):
  path, prompt = tmp_path / "x.jsonl", "one\u2028two\x85three"
  path.write_text(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n", encoding="utf-8")
  args = make_parser().parse_args(["--run=x", f"--prompts_file={path}"])
  assert [text for text, _ in read_requests(args)] == [prompt]


def test_a_damaged_checkpoint_is_named_and_passed_over(run_path, tmp_path, capsys):
  path = shutil.copytree(run_path, tmp_path / "copy")
  meta = path / "checkpoints" / "40" / "meta.json"
  meta.write_text(meta.read_text().replace("40", "41", 1))
  code, _, err = run_main(capsys, f"--run={path}", "--prompt=a", "--max_tokens=2")
  assert code == 0 and "checkpoint 40 is damaged" in err and "at step 20" in err
  code, _, err = run_main(capsys, f"--run={path}", "--prompt=a", "--max_tokens=2", "--step=40")
  assert code == 1 and "damaged" in err


# Imported models.

@pytest.fixture(scope="module")
def model_path(run_path):
  """The run as if it were imported: with a tokenizer.json and a chat template of its own."""
  path = shutil.copytree(run_path, run_path.parent / "imported")
  (path / "tokenizer.model").unlink()
  config = json.loads((path / "config.json").read_text())
  config["config"]["data"]["tokenizer"] |= {"kind": "huggingface", "path": None}
  (path / "config.json").write_text(json.dumps(config))
  byte_level().save(str(path / "tokenizer.json"))
  (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>",
                                                          "chat_template": TEMPLATES["llama3"]}))
  (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9999]}))
  return path


class Scripted:
  """Says "Hi <", then the last of its stop ids; what it was asked is in `asked`. Nothing is compiled."""
  asked, says, interrupted = [], [], False

  def __init__(self, cfg, params, mesh, *, stop_ids, max_length, **settings):
    self.stop_ids, self.max_length, self.counters = stop_ids, max_length, collections.Counter()

  def generate(self, prompts, settings, *, cancelled):
    for i, prompt in enumerate(prompts):
      self.asked.append((list(prompt), self.stop_ids))
      for token in (*self.says, self.stop_ids[-1]):
        if self.interrupted:
          signal.raise_signal(signal.SIGINT)
        yield Token(i, token, 0.0, (), "stop" if token == self.stop_ids[-1] else None)


@pytest.fixture
def talker(model_path, monkeypatch):
  """(tokenizer, chat, what the model was asked)."""
  monkeypatch.setattr("infer.engine.Engine", Scripted)
  monkeypatch.setattr(Scripted, "asked", [])
  run = open_run(model_path, "--model")
  assert run.tokenizer.vocab_size == 320 and not run.tokenizer.decode([319])  # Rows without a token.
  monkeypatch.setattr(Scripted, "says", run.tokenizer.encode("Hi <"))
  return run.tokenizer, open_chat(run), Scripted.asked


def test_a_model_is_asked_through_its_template(model_path, talker, capsys):
  tokenizer, chat, asked = talker
  messages = [{"role": "system", "content": "Be <|eot_id|> kind"}, {"role": "user", "content": "Who?"}]
  code, out, _ = run_main(capsys, f"--model={model_path}", "--prompt=Who?", "--system=Be <|eot_id|> kind")
  (ids, ends), = asked
  assert (code, out, ids) == (0, "Hi <\n", chat.encode(messages))
  assert ids.count(tokenizer.specials["<|eot_id|>"].id) == 2
  assert set(ends) == {7, tokenizer.eos_id, tokenizer.specials["<|eot_id|>"].id}
  code, out, _ = run_main(capsys, f"--model={model_path}", "--prompt=Who?", "--raw")
  assert (code, out) == (0, "Who?Hi <\n")
  assert asked[1] == ([tokenizer.bos_id, *tokenizer.encode("Who?")], tuple(sorted({7, tokenizer.eos_id})))


def test_a_conversation_keeps_what_was_said(model_path, talker, capsys, monkeypatch):
  _, chat, asked = talker
  monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n\nAnd <|eot_id|>?\nSo\n"))
  code, out, err = run_main(capsys, f"--model={model_path}")
  assert code == 0 and "Ctrl-D" in err and out == "Hi <\n" * 3
  said = [{"role": r, "content": c} for r, c in (
      ("user", "Who?"), ("assistant", "Hi <"), ("user", "And <|eot_id|>?"),
      ("assistant", "Hi <"), ("user", "So"))]
  assert [ids for ids, _ in asked] == [chat.encode(said[:n]) for n in (1, 3, 5)]


def test_a_conversation_forgets_what_it_has_no_room_for(model_path, talker, capsys, monkeypatch):
  _, chat, asked = talker
  monkeypatch.setattr("infer.generate.TALK", 256)
  monkeypatch.setattr("sys.stdin", io.StringIO("One?\nTwo?\nThree?\n"))
  code, out, err = run_main(capsys, f"--model={model_path}", "--max_tokens=150", "--system=Be kind")
  assert code == 0 and out == "Hi <\n" * 3 and "note: the first 2 messages are forgotten" in err
  said = [{"role": r, "content": c} for r, c in (
      ("system", "Be kind"), ("user", "Two?"), ("assistant", "Hi <"), ("user", "Three?"))]
  assert asked[2][0] == chat.encode(said)
  monkeypatch.setattr("sys.stdin", io.StringIO("Why? " * 100))
  code, _, err = run_main(capsys, f"--model={model_path}", "--max_tokens=150")
  assert code == 2 and "there is room for 106 beside an answer" in err


def test_an_answer_is_interrupted(model_path, talker, capsys, monkeypatch):
  """By Ctrl-C, between two tokens; the conversation goes on, and so does what Ctrl-C meant before."""
  before = signal.getsignal(signal.SIGINT)
  monkeypatch.setattr(Scripted, "interrupted", True)
  monkeypatch.setattr("sys.stdin", io.StringIO("Who?\nSo?\n"))
  code, out, _ = run_main(capsys, f"--model={model_path}")
  tokenizer, _, asked = talker
  assert code == 0 and out == (tokenizer.decode(Scripted.says[:1]) + "\n") * 2 and len(asked) == 2
  assert signal.getsignal(signal.SIGINT) == before


def test_a_text_longer_than_the_table_of_positions_is_refused(model_path, talker, capsys):
  path = shutil.copytree(model_path, model_path.parent / "short")
  config = json.loads((path / "config.json").read_text())
  config["config"]["model"] |= {"positions": "learned", "max_length": 30}
  (path / "config.json").write_text(json.dumps(config))
  code, _, err = run_main(capsys, f"--model={path}", "--raw", "--prompt=abc", "--max_tokens=40")
  assert code == 2 and re.search("max_tokens=40 are more than the model.max_length=30 .*nearest valid", err)


@pytest.mark.parametrize("flags, words", [
  ([], "give --run=DIR .* or --model=DIR"),
  (["--run={}", "--model={}"], "not both"),
  (["--run={}", "--raw", "--prompt=a"], "--raw is about a chat template"),
  (["--model={}", "--raw", "--system=a", "--prompt=a"], "--raw leaves out"),
  (["--model={}", "--raw"], "give --prompt=TEXT"),
  (["--model={}/../small", "--prompt=a"], "no chat template: say --raw"),
  (["--model={}/checkpoints", "--prompt=a"], "--model=.* is no imported model"),
  (["--model={}/../refusing", "--prompt=a"], "chat template: .*say it with flowers")])
def test_mistakes_about_models_exit_2(model_path, capsys, flags, words):
  if any("refusing" in flag for flag in flags):
    path = shutil.copytree(model_path, model_path.parent / "refusing")
    template = "{% if messages | length == 1 %}{{ raise_exception('say it with flowers') }}{% endif %}"
    (path / "chat_template.jinja").write_text(template)
  code, _, err = run_main(capsys, *(flag.replace("{}", str(model_path)) for flag in flags))
  assert code == 2 and "Traceback" not in err and re.search(words, err), err


def test_help_teaches(capsys):
  code, out, _ = run_main(capsys, "--help")
  assert code == 0
  for word in ("python -m infer.generate --run=", "--model=smollm2", "--raw",
               "--top_p", "0 is greedy", "Hugging Face", "--n_samples"):
    assert word in out
