package interop

import "mesh/control/admin"

func keyForTag() admin.KeyCreate { return admin.KeyCreate{Tags: []string{"tag:a"}} }
