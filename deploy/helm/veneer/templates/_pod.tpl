{{/*
The pod of any component. Argument: (dict "root" $ "component" "engine" "values" .Values.engine).
*/}}
{{- define "veneer.pod" -}}
{{- $root := .root -}}
{{- $v := .root.Values -}}
metadata:
  labels:
    {{- include "veneer.labels" . | nindent 4 }}
    {{- with .values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "veneer.serviceAccount" $root }}
  automountServiceAccountToken: false
  # Variables of Services could be taken for settings.
  enableServiceLinks: false
  {{- with $v.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  terminationGracePeriodSeconds: {{ include "veneer.terminationSeconds" $root }}
  securityContext:
    {{- include "veneer.podSecurity" . | nindent 4 }}
  {{- if and $v.tls.enabled $v.tls.clients.enabled }}
  # The probe calls this pod by a name in its certificate.
  hostAliases:
    - ip: 127.0.0.1
      hostnames: [{{ include "veneer.probeHost" $root | quote }}]
  {{- end }}
  {{- if and (include "veneer.sharedBases" $root) (eq $v.bases.prepare "pod") }}
  initContainers:
    - {{- include "veneer.prepare" . | nindent 6 }}
  {{- end }}
  containers:
    - name: veneer
      image: {{ include "veneer.image" $root }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      args:
        {{- include "veneer.args" . | trim | nindent 8 }}
      {{- with include "veneer.env" . | trim }}
      env:
        {{- . | nindent 8 }}
      {{- end }}
      ports:
        - {name: grpc, containerPort: {{ $v.ports.grpc }}, protocol: TCP}
        - {name: http, containerPort: {{ $v.ports.http }}, protocol: TCP}
        - {name: metrics, containerPort: {{ $v.ports.metrics }}, protocol: TCP}
      {{- include "veneer.probes" . | nindent 6 }}
      lifecycle:
        preStop:
          exec:
            command: ["sleep", {{ $v.drain.preStopSeconds | toString | quote }}]
      resources:
        {{- include "veneer.resources" . | nindent 8 }}
      securityContext:
        {{- include "veneer.containerSecurity" . | nindent 8 }}
      volumeMounts:
        {{- include "veneer.dataMounts" . | nindent 8 }}
        {{- range $name, $secret := include "veneer.storageSecrets" . | fromYaml }}
        - {name: {{ $name }}, mountPath: /run/secrets/{{ $name }}, readOnly: true}
        {{- end }}
        {{- if $v.keys.enabled }}
        - {name: keys, mountPath: /run/secrets/keys, readOnly: true}
        {{- end }}
        {{- if $v.tls.enabled }}
        - {name: tls, mountPath: /run/secrets/tls, readOnly: true}
        {{- if $v.tls.clients.enabled }}
        - {name: clients, mountPath: /run/secrets/clients, readOnly: true}
        - {name: probe, mountPath: /run/secrets/probe, readOnly: true}
        {{- end }}
        {{- end }}
        {{- if eq .component "engine" }}
        {{- range include "veneer.registrySecrets" $root | fromYaml }}
        - {name: {{ .name }}, mountPath: /run/secrets/{{ .name }}, readOnly: true}
        {{- end }}
        {{- end }}
        {{- with $v.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    {{- include "veneer.dataVolumes" . | nindent 4 }}
    {{- range $name, $secret := include "veneer.storageSecrets" . | fromYaml }}
    - name: {{ $name }}
      secret: {secretName: {{ $secret }}, defaultMode: 0440}
    {{- end }}
    # Folders, not single files: those would stay the old ones when a Secret changes.
    {{- if $v.keys.enabled }}
    - name: keys
      secret: {secretName: {{ include "veneer.keysSecret" $root }}, defaultMode: 0440}
    {{- end }}
    {{- if $v.tls.enabled }}
    - name: tls
      secret: {secretName: {{ include "veneer.tlsSecret" $root }}, defaultMode: 0440}
    {{- if $v.tls.clients.enabled }}
    - name: clients
      secret:
        secretName: {{ required "tls.clients.caSecret: name the Secret with ca.crt" $v.tls.clients.caSecret }}
        defaultMode: 0440
    - name: probe
      secret:
        secretName: {{ required "tls.clients.probeSecret: name the Secret with the probe's certificate" $v.tls.clients.probeSecret }}
        defaultMode: 0440
    {{- end }}
    {{- end }}
    {{- if eq .component "engine" }}
    {{- range include "veneer.registrySecrets" $root | fromYaml }}
    - name: {{ .name }}
      secret: {secretName: {{ .secret }}, defaultMode: 0440}
    {{- end }}
    {{- end }}
    {{- with $v.volumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- include "veneer.spread" . | nindent 2 }}
{{- end -}}

{{/*
Replicas away from each other, as far as the cluster allows. A pool of one node, or one without
zones, still gets all of them.
*/}}
{{- define "veneer.spread" -}}
{{- $affinity := deepCopy .values.affinity -}}
{{- if not (or (include "veneer.owns" .) (hasKey $affinity "podAntiAffinity")) -}}
{{- $own := dict "matchLabels" (include "veneer.selector" . | fromYaml) -}}
{{- $term := dict "weight" 100 "podAffinityTerm" (dict "topologyKey" "kubernetes.io/hostname" "labelSelector" $own) -}}
{{- $_ := set $affinity "podAntiAffinity" (dict "preferredDuringSchedulingIgnoredDuringExecution" (list $term)) -}}
{{- end }}
{{- with $affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml .values.topologySpreadConstraints | nindent 2 }}
{{- else if not (or (include "veneer.owns" .) (kindIs "slice" .values.topologySpreadConstraints)) }}
topologySpreadConstraints:
  - topologyKey: topology.kubernetes.io/zone
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "veneer.selector" . | nindent 8 }}
    # Of one version: in an update, old pods are no reason to avoid a zone.
    matchLabelKeys: [pod-template-hash]
{{- end }}
{{- end -}}

{{- define "veneer.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) | quote -}}
{{- end -}}

{{- define "veneer.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "veneer.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* What engines show to the registry, and check it by: name of the volume, and Secret. */}}
{{- define "veneer.registrySecrets" -}}
{{- $v := .Values -}}
{{- if $v.keys.enabled }}
key: {name: registry-key, secret: {{ required "engine.registry.keySecret: name the Secret with an API key that has the role operator" $v.engine.registry.keySecret }}}
{{- end }}
{{- if and $v.tls.enabled $v.engine.registry.caSecret }}
ca: {name: registry-ca, secret: {{ $v.engine.registry.caSecret }}}
{{- end }}
{{- if and $v.tls.enabled $v.tls.clients.enabled }}
cert: {name: registry-cert, secret: {{ required "engine.registry.certSecret: name the Secret with a certificate for the registry" $v.engine.registry.certSecret }}}
{{- end }}
{{- end -}}

{{- define "veneer.args" -}}
{{- $v := .root.Values -}}
{{- if ne .component "server" }}
- {{ printf "--role=%s" .component | quote }}
{{- end }}
{{- if eq .component "engine" }}
- {{ printf "--registry=%s%s-registry.%s.svc:%v" (ternary "https://" "" $v.tls.enabled) (include "veneer.fullname" .root) .root.Release.Namespace $v.ports.grpc | quote }}
{{- if $v.keys.enabled }}
- "--registry-key-file=/run/secrets/registry-key/key"
{{- end }}
{{- if and $v.tls.enabled $v.engine.registry.caSecret }}
- "--registry-ca=/run/secrets/registry-ca/ca.crt"
{{- end }}
{{- if and $v.tls.enabled $v.tls.clients.enabled }}
- "--registry-cert=/run/secrets/registry-cert/tls.crt"
- "--registry-cert-key=/run/secrets/registry-cert/tls.key"
{{- end }}
{{- end }}
- {{ printf "--listen=0.0.0.0:%v" $v.ports.grpc | quote }}
- {{ printf "--openai-listen=0.0.0.0:%v" $v.ports.http | quote }}
- {{ printf "--metrics-listen=0.0.0.0:%v" $v.ports.metrics | quote }}
- {{ printf "--metrics-names=%s" (include "veneer.metricsNames" .root) | quote }}
- "--data-dir=/var/lib/veneer/data"
- {{ printf "--cache-dir=%s" (include "veneer.cacheDir" .root) | quote }}
{{- if eq .component "engine" }}
- {{ printf "--adapter-cache-bytes=%s" (include "veneer.bytes" $v.engine.adapterCache) | quote }}
{{- end }}
{{- with $v.store.url }}
- {{ printf "--store=%s" . | quote }}
{{- end }}
{{- if and $v.catalog.url (ne .component "engine") }}
- {{ printf "--catalog=%s" $v.catalog.url | quote }}
- {{ printf "--store-cache-bytes=%s" (include "veneer.bytes" $v.store.cache) | quote }}
{{- if $v.catalog.passwordSecret }}
- "--catalog-password-file=/run/secrets/catalog/password"
{{- end }}
{{- end }}
- "--log-format=json"
- {{ printf "--grace=%v" $v.drain.graceSeconds | quote }}
{{- /* An empty value takes back what the image sets. */}}
- {{ printf "--keys-file=%s" (ternary "/run/secrets/keys/keys.toml" "" $v.keys.enabled) | quote }}
- {{ printf "--tls-cert=%s" (ternary "/run/secrets/tls/tls.crt" "" $v.tls.enabled) | quote }}
- {{ printf "--tls-key=%s" (ternary "/run/secrets/tls/tls.key" "" $v.tls.enabled) | quote }}
{{- if and $v.tls.enabled $v.tls.clients.enabled }}
- "--tls-client-ca=/run/secrets/clients/ca.crt"
{{- end }}
{{- $flags := merge (deepCopy .values.flags) $v.flags }}
{{- $asks := or $v.keys.enabled (and $v.tls.enabled $v.tls.clients.enabled) (hasKey $flags "jwt-issuer") }}
{{- if not (and $v.tls.enabled $asks) }}
- "--insecure"
{{- end }}
{{- /* Clients without keys may come by the name of any route or gateway in front. */}}
{{- if not (or $asks (hasKey $flags "allowed-hosts")) }}
- "--allowed-hosts=*"
{{- end }}
{{- include "veneer.flags" $flags }}
{{- end -}}
