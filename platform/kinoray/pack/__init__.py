"""Videos -> tar shards and a catalog: plan.py says what goes where, unit.py packs one unit, verb.py runs the job."""
