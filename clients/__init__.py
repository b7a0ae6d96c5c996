"""What a worker imports: clients, swap types, buffers."""

if __name__ != "gcma_shm.clients":
    raise ImportError(
        "import it as `gcma_shm.clients`: the folder `clients` is part of that package, not one by itself"
    )
