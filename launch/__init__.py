"""The `loraloom` command and the verbs that need no torch. What trains or samples is started by name."""
