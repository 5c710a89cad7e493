"""The eager model, one call's weights in memory at a time: whole calls, or their operators one by one."""
