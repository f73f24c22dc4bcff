#!/usr/bin/env bash
# Builds the test cluster's programs from the pinned Go modules, static and stripped, and prints the folder that holds them.
# Each program is put in place when it is whole: an interrupted build goes on where it stopped, and a second call builds nothing.
set -euo pipefail
cd "$(dirname "$0")"

# folder of go.mod | program | package | linker flags that name the version; the ones that everything else waits for first
kubernetes_version() { # version
    local package
    for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
        printf -- '-X %s.gitVersion=v%s -X %s.gitMajor=%s -X %s.gitMinor=%s -X %s.gitTreeState=archive ' \
            $package "$1" $package "${1%%.*}" $package "$(cut -d. -f2 <<<"$1")" $package
    done
}
CONTROL_PLANE=$(kubernetes_version 1.37.2)
NODE=$(kubernetes_version 1.34.4)
PROGRAMS=(
    "etcd|etcd|go.etcd.io/etcd/server/v3|"
    "kwok|kwok|sigs.k8s.io/kwok/cmd/kwok|-X sigs.k8s.io/kwok/pkg/consts.Version=v0.7.0"
    "kwok|kwokctl|sigs.k8s.io/kwok/cmd/kwokctl|-X sigs.k8s.io/kwok/pkg/consts.Version=v0.7.0"
    "control-plane|kube-apiserver|k8s.io/kubernetes/cmd/kube-apiserver|$CONTROL_PLANE"
    "control-plane|kube-controller-manager|k8s.io/kubernetes/cmd/kube-controller-manager|$CONTROL_PLANE"
    "control-plane|kube-scheduler|k8s.io/kubernetes/cmd/kube-scheduler|$CONTROL_PLANE"
    "control-plane|kubectl|k8s.io/kubernetes/cmd/kubectl|$CONTROL_PLANE"
    "node|kubelet|k8s.io/kubernetes/cmd/kubelet|$NODE"
    "node|kube-proxy|k8s.io/kubernetes/cmd/kube-proxy|$NODE"
    "training-operator|training-operator|github.com/kubeflow/training-operator/cmd/training-operator.v1|"
    "coredns|coredns|github.com/coredns/coredns|"
    "pause|pause|.|"
)
OPERATOR=github.com/kubeflow/training-operator

KEY=$(cat build.sh ./*/go.mod ./*/go.sum pause/main.go | sha256sum | cut -c1-16)
FOLDER="${CONVOY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/convoy}/cluster-$KEY"
mkdir -p "$FOLDER/bin"
[ -e "$FOLDER/complete" ] && { echo "$FOLDER"; exit 0; }
command -v go >/dev/null || { echo "cluster: Go is needed to build the cluster's programs" >&2; exit 2; }

# One build at a time: a second one would do all the work again beside the first.
exec 9>"$FOLDER/lock"
flock -n 9 || { echo "cluster: waiting for another build into $FOLDER" >&2; flock 9; }
export CGO_ENABLED=0 GOTOOLCHAIN=local
number=0
for entry in "${PROGRAMS[@]}"; do
    IFS='|' read -r module program package version <<<"$entry"
    number=$((number + 1))
    [ -e "$FOLDER/bin/$program" ] && continue
    start=$SECONDS
    (cd "$module" && go build -trimpath -buildvcs=false -ldflags "-s -w $version" -o "$FOLDER/bin/.$program" "$package") >&2
    mv "$FOLDER/bin/.$program" "$FOLDER/bin/$program"
    echo "cluster: built $program ($number of ${#PROGRAMS[@]}, $((SECONDS - start)) s)" >&2
done
# The operator's manifests come with its module, so that they fit the program.
if [ ! -e "$FOLDER/training-operator" ]; then
    rm -rf "$FOLDER/.training-operator"
    cp -r "$(cd training-operator && go list -m -f '{{.Dir}}' "$OPERATOR")/manifests" "$FOLDER/.training-operator"
    chmod -R u+w "$FOLDER/.training-operator"
    mv "$FOLDER/.training-operator" "$FOLDER/training-operator"
fi
touch "$FOLDER/complete"
echo "$FOLDER"
