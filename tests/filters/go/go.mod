module portolan.example/test-filter

go 1.24
