module convoy/tools/cluster/pause

go 1.26
