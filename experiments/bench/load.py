"""What `bench serve` is asked: its flags, checked. Nothing here is slow to import, or optional."""
import dataclasses
import pathlib
import re
import shlex

CLIENTS = 16
OURS = ("--model", "--run", "--host", "--port", "--api_key_file")  # Flags of the server that we give.


class ServerFailed(RuntimeError):
  """There is no server to measure.

  Attributes:
    code: the exit code that it makes ours.
  """

  def __init__(self, message: str, code: int = 1):
    super().__init__(message)
    self.code = code


def add_flags(parser) -> None:
  add = parser.add_argument_group("which server: one of").add_argument
  add("--url", help="of one that runs, as http://127.0.0.1:8000")
  add("--model", metavar="DIR", help="start one for an imported model, and end it afterwards")
  add("--run", metavar="DIR", help="start one for a run of ours")
  add("--server", default="", metavar="FLAGS", help='of infer.server, for one that is started: "--slots=8"')
  add("--here", metavar="DIR",
      help="with --url: the server is on this machine and serves this folder, so that its decode can be held "
           "against the memory's bandwidth")
  add("--api_key_file", metavar="FILE", help="its one line is the server's key; or set ASSAY_API_KEY")
  add = parser.add_argument_group("which load").add_argument
  add("--clients", type=int, metavar="N",
      help=f"closed loop: each asks again when its answer has ended ({CLIENTS})")
  add("--static", action="store_true", help="static batching: they wait for each other before they ask again")
  add("--rate", type=float, metavar="X", help="open loop instead: requests a second, Poisson")
  add("--requests", type=int, default=96, metavar="N", help="that count (%(default)s)")
  add("--warm_up", type=int, default=16, metavar="N", help="requests before them (%(default)s)")
  add("--prompt_tokens", default="32:256", metavar="LOW:HIGH",
      help="many short, few long: the logarithm is uniform (%(default)s)")
  add("--output_tokens", default="8:256", metavar="LOW:HIGH", help="(%(default)s)")
  add("--common", type=float, default=0.0, metavar="X",
      help="share of every prompt that all prompts begin with, 0 to 1 (%(default)s)")
  add("--seed", type=int, default=0, metavar="N", help="same seed, same requests (%(default)s)")
  add("--timeout_s", type=float, default=600.0, metavar="X", help="for a request (%(default)s)")
  add("--plot", metavar="FILE.png", help="draw the latencies")


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
  """How requests are sent, and which."""
  requests: int
  warm_up: int
  prompt: tuple[int, int]
  output: tuple[int, int]
  common: float
  seed: int
  clients: int
  rate: float | None
  static: bool
  timeout_s: float

  @property
  def longest(self) -> int:
    """Most tokens of a prompt and its text."""
    return self.prompt[1] + self.output[1]

  @property
  def loop(self) -> str:
    return "open" if self.rate else "static" if self.static else "closed"


def read_load(args) -> Load:
  """Raises ValueError: a flag out of range, or two that contradict each other."""
  _check_server(args)
  for name in ("clients", "static"):
    if args.rate is not None and getattr(args, name):
      raise ValueError(f"--rate={args.rate:g} sends requests at their time: it does not go with --{name}")
  for name, least in (("clients", 1), ("requests", 1), ("warm_up", 0), ("seed", 0)):
    if (value := getattr(args, name)) is not None and value < least:
      raise ValueError(f"--{name}={value} must be at least {least}")
  for name in ("rate", "timeout_s"):
    if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
      raise ValueError(f"--{name}={value} must be above 0")
  if not 0 <= args.common <= 1:
    raise ValueError(f"--common={args.common} must be in 0 .. 1")
  if args.plot and not (args.plot.endswith(".png") and pathlib.Path(args.plot).absolute().parent.is_dir()):
    raise ValueError(f"--plot={args.plot} must be a .png in a folder that exists")
  return Load(args.requests, args.warm_up, _read_range("prompt_tokens", args.prompt_tokens),
              _read_range("output_tokens", args.output_tokens), args.common, args.seed,
              CLIENTS if args.clients is None else args.clients, args.rate, args.static, args.timeout_s)


def _check_server(args):
  given = [name for name in ("url", "model", "run") if getattr(args, name)]
  if len(given) != 1:
    raise ValueError("give one of --url (a server that runs), --model and --run (to start one)"
                     + (f", not --{' and --'.join(given)}" if given else ""))
  if args.url and not re.match(r"https?://[^/]", args.url):
    raise ValueError(f"--url={args.url} must begin with http:// or https://, as http://127.0.0.1:8000")
  if args.url and args.server:
    raise ValueError(f"--server={args.server} is for a server that is started, not for --url")
  if args.here and not args.url:
    raise ValueError(f"--here={args.here} goes with --url; of a server that is started it is known")
  if ours := {word.partition("=")[0] for word in shlex.split(args.server)} & {*OURS}:
    raise ValueError(f"--server={args.server}: {min(ours)} cannot be set there")


def _read_range(name, text):
  if not (found := re.fullmatch(r"(\d+)(?::(\d+))?", text)):
    raise ValueError(f"--{name}={text} must be LOW:HIGH, as 32:256, or one number")
  low, high = int(found[1]), int(found[2] or found[1])
  if not 1 <= low <= high:
    raise ValueError(f"--{name}={text}: it must be 1 <= LOW <= HIGH")
  return low, high


def check_length(load: Load, max_length: int | None) -> None:
  """Raises ValueError: the longest request is longer."""
  if max_length is not None and load.longest > max_length:
    nearest = max_length - load.prompt[1]
    valid = (f"--output_tokens={min(load.output[0], nearest)}:{nearest}" if nearest > 0
             else f"--prompt_tokens={max(max_length - load.output[1], 1)}")
    raise ValueError(f"--prompt_tokens and --output_tokens go to {load.longest} tokens, and there is "
                     f"room for {max_length}; nearest valid: {valid}")
