"""Videos -> tar shards and a catalog: plan.py says what goes where, shard.py packs one, verb.py runs the job."""
