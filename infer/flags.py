"""What the commands of infer share, before JAX is imported."""
from data.flags import nearest


def parse_strictly(parser, argv):
  """The arguments of a command that takes --run or --model.

  Raises:
    ValueError: an unknown argument, with the nearest; neither of the two, or both.
  """
  args, unknown = parser.parse_known_args(argv)
  if unknown:
    near = nearest(unknown[0].partition("=")[0], parser._option_string_actions)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; see --help"
    raise ValueError(f"unknown argument {unknown[0]}{hint}")
  if (args.run is None) == (args.model is None):
    raise ValueError("give --run=DIR (a run of ours) or --model=DIR (an imported model)"
                     + (", not both" if args.run else ""))
  return args
