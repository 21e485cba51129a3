"""The result table: its schema, units of work, exactly-once commits, resume, reading."""
