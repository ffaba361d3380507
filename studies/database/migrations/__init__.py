"""Alembic's folder: one file in `versions/` per revision of the tables."""
