"""Environment of a Ray cluster on this machine alone; free of Ray, because Ray reads it when it is imported."""

LOCAL_CLUSTER = {
    # Only this process talks to the cluster, over the loopback interface; a token file in the user's home would change
    # how later clusters of the same user start.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray warns, at the level of errors, about how its own actor pools pass their arguments: nothing that a person who
    # watches could act on. Setting this variable brings the messages back.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # Train's controller fetches a report every two seconds by default, and a worker waits for that before its next
    # epoch: most of the time of a small job.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # A process that looks for nodes about to be taken away, of which there are none: it costs a second of a small job's
    # start, and wakes up a hundred times a second beside the training. And gauges for a dashboard that is not there.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
"""A variable that is set already keeps its value."""
