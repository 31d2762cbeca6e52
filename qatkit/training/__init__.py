"""What a training loop calls besides its own code: schedules, losses, statistics, guards."""
