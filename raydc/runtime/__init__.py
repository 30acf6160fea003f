"""Ray: joining a cluster, the training group, the rows on their way."""
