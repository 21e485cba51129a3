"""A finished result table as rows: filtered, joined, sorted, written in other forms."""
