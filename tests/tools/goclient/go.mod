module ebfw.test/goclient

go 1.24
