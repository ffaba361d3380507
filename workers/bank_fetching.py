"""Entries of the bank that a node lacks, from the driver's node, through Ray's object store."""

from collections.abc import Callable
from pathlib import Path

from apportion.spaces.bank import Bank, NotFetched
from apportion.workers.node_tasks import read_file
from apportion.workers.spec import Origin

RETRIES = 2


def fetcher(origin: Origin) -> Callable[[str], tuple[bytes, str]]:
    """Gives an entry's bytes and their hash, by its key. Raises NotFetched."""
    bank = Bank(Path(origin["bank"]))

    def fetch(key: str) -> tuple[bytes, str]:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(origin["node"], soft=False)
        reading = ray.remote(read_file).options(
            num_cpus=0, scheduling_strategy=there, max_retries=RETRIES, retry_exceptions=True
        )
        try:
            content: tuple[bytes, str] = ray.get(reading.remote(str(bank.path(key))))
        except ray.exceptions.RayError as error:
            told = " ".join(str(getattr(error, "cause", error)).split())
            raise NotFetched(f"the driver's node does not give {key}: {told}") from error
        return content

    return fetch
