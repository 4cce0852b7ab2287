"""One file for each adapter method, named as users write it in `adapter.method`."""
