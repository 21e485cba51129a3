"""What a sweep tries, and the page that shows what came of it; kinoray.run.tune does it."""
