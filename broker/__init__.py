"""The process that owns an arena: decides, serves, sweeps, reports."""

if __name__ != "gcma_shm.broker":
    raise ImportError("import it as `gcma_shm.broker`: the folder `broker` is part of that package, not one by itself")
