"""Label files in Delta and Iceberg tables."""
