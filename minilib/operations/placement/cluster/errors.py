"""What makes a description of a cluster impossible; each message says what came and how to mend it."""


class InvalidTopology(ValueError):
    """A description that is no tree of hosts, NVLink domains, racks and units."""


class TopologyLoop(InvalidTopology):
    """A group that contains itself, directly or through others."""


class TwoParents(InvalidTopology):
    """A host in two racks, or another group in two others."""


class UnknownMember(InvalidTopology):
    """A group that contains what is described nowhere."""


class UnknownLink(InvalidTopology):
    """A link of no level, or one that the data sheet does not have."""


class NoGpus(InvalidTopology):
    """A host without a GPU, or a cluster without a host."""


class NoSuchCluster(LookupError):
    """Neither a file nor a cluster that is stored here; the message lists those that are."""
