"""Where a server listens, and to whom. Nothing here is slow to import."""
import dataclasses
import ipaddress
import os
import pathlib
import socket

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How to serve, whatever the model."""
  host: str = "127.0.0.1"
  port: int = 8000  # 0: a free one.
  key: str | None = None  # That clients must show.
  slots: int = 16  # The engine's.
  max_waiting: int = 64  # Texts beyond them that are taken in.
  deadline_s: float = 600.0  # For a text.
  stuck_s: float = 60.0  # Without a step, until the engine is taken for dead.
  drain_s: float = 30.0  # For texts to end after SIGTERM.


def is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
  """A socket that has the address; it listens when the server runs. Raises ValueError: it cannot be had."""
  try:
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
  except OSError as e:
    raise ValueError(f"--host={host} --port={port}: {e.strerror or e}") from None
  return listener


def read_key(host: str, file: str | None) -> str | None:
  """The key that clients must show: of `file`, else of ASSAY_API_KEY. None: there is none, and only this
  machine is answered.

  Raises:
    ValueError: it is missing, unreadable, or no key.
  """
  key, source = os.environ.get("ASSAY_API_KEY"), "ASSAY_API_KEY"
  if file is not None:
    source = f"--api_key_file={file}"
    try:
      key = pathlib.Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
      raise ValueError(f"{source} cannot be read: {e}") from None
  if key is None:
    if not is_loopback(host):
      raise ValueError(f"--host={host} answers other machines: give --api_key_file=FILE or set "
                       "ASSAY_API_KEY")
    return None
  if not (16 <= len(key) <= 512 and key.isascii() and key.isprintable() and " " not in key):
    raise ValueError(f"{source} must hold 16 to 512 visible ASCII characters, as of `openssl rand -hex 24`")
  return key
