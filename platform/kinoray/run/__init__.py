"""The only folder that imports ray: each module composes the pure parts into one job."""
