"""Ways to train the same: each module gives contestants for a prepared work. Peers run in environments of their own."""
