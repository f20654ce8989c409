"""What the user has to hear about."""


class HubError(ValueError):
  """A checkpoint that cannot be taken in or written out as it is; the message says what to do."""
