package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// operatorAccount is who the lab's flightctl is logged in as.
const operatorAccount = "operator"

// bootstrapManifest is what Flight Control needs in the cluster: the rights of
// its services, its roles, and an operator.
const bootstrapManifest = `apiVersion: v1
kind: Namespace
metadata: {name: flightctl}
---
apiVersion: v1
kind: Namespace
metadata: {name: jetbridge-system}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: flightctl-services, namespace: flightctl}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: operator, namespace: flightctl}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: jetbridge-shim, namespace: jetbridge-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: flightctl-services}
rules:
- {apiGroups: [authentication.k8s.io], resources: [tokenreviews], verbs: [create]}
- {apiGroups: [authorization.k8s.io], resources: [subjectaccessreviews], verbs: [create]}
- {apiGroups: [rbac.authorization.k8s.io], resources: [rolebindings, roles], verbs: [get, list, watch]}
- {apiGroups: [""], resources: [namespaces, secrets], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: flightctl-services}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: flightctl-services}
subjects: [{kind: ServiceAccount, name: flightctl-services, namespace: flightctl}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: flightctl-admin}
rules: [{apiGroups: [flightctl.io], resources: ["*"], verbs: ["*"]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: operator, namespace: flightctl}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: flightctl-admin}
subjects: [{kind: ServiceAccount, name: operator, namespace: flightctl}]
`

// fleetManifest is the fleet of the even devices.
const fleetManifest = `apiVersion: flightctl.io/v1beta1
kind: Fleet
metadata: {name: edge}
spec:
  selector: {matchLabels: {fleet: edge}}
  template: {spec: {}}
`

// bootstrap gives everybody in the cluster their rights, and the services their tokens.
func (u *upper) bootstrap(ctx context.Context) error {
	if _, err := u.run(ctx, []byte(bootstrapManifest), "kubectl", "apply", "-f", "-"); err != nil {
		return err
	}
	packaged := filepath.Join(u.Checkout, "packaging/kubernetes")
	manifests, err := rights(packaged)
	if err != nil {
		return err
	}
	for _, file := range manifests {
		if _, err := u.run(ctx, nil, "kubectl", "apply", "-f", file); err != nil {
			return err
		}
	}
	return u.client.Tokens(ctx)
}

func isDeployment(manifest []byte) bool {
	return bytes.Contains(append([]byte("\n"), manifest...), []byte("\nkind: Deployment\n"))
}

// rights lists the shipped manifests but the Deployment: here the shim is a process.
func rights(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list manifests: %w", err)
	}
	var files []string
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if filepath.Ext(path) != ".yaml" {
			continue
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("cannot read manifest: %w", err)
		}
		if !isDeployment(b) {
			files = append(files, path)
		}
	}
	return files, nil
}
