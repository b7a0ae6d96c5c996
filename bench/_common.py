"""What the scripts here share, in one place to import it from; each idea has a module of its own.

A *contender* is one way to do a job. Contenders take turns within rounds, so that the machine's drift hits all alike; a ratio is taken within
each round, and its median and spread over the rounds are told.
"""

from __future__ import annotations

from crew import STOP_S, Crew, cpu_seconds, crew
from figures import Histogram, Ratio, Samples, Summary, clock_cost_ns, readings_ns, singles_ns
from floors import Floor, address_of, compile_c, compile_floor
from report import OUT, Bar, Plot, Section, Verdict, table, tell, write_json
from surroundings import describe_machine, machine, scratch

__all__ = [
    "OUT",
    "STOP_S",
    "Bar",
    "Crew",
    "Floor",
    "Histogram",
    "Plot",
    "Ratio",
    "Samples",
    "Section",
    "Summary",
    "Verdict",
    "address_of",
    "clock_cost_ns",
    "compile_c",
    "compile_floor",
    "cpu_seconds",
    "crew",
    "describe_machine",
    "machine",
    "readings_ns",
    "scratch",
    "singles_ns",
    "table",
    "tell",
    "write_json",
]
