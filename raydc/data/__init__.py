"""From Parquet to rows: schemas, slices, columns, profile."""
