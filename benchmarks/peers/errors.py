"""What goes wrong with a peer."""


class PeerError(RuntimeError):
    """A peer cannot be installed, started or asked; one line says why."""
