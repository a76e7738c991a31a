"""Turn recorded runs into schedules: search masks, fit each, and choose."""
