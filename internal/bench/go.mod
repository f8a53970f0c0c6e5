module mesh/internal/bench

go 1.26.3
